"""Every check of a checked run: a kernel with the bug is caught, its repaired twin passes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import metalsim

HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"
TG = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@dataclass
class Planted:
    """A kernel body with a bug, the repaired body, and what the report must say.

    Both see `device float* x [[buffer(0)]]`, `device float* y [[buffer(1)]]`, `i` (thread in grid), `t` (thread in
    threadgroup), `lane`, and `g` (threadgroup).
    """

    bug: str
    repaired: str
    says: str
    threads: int = 64
    group_size: int = 64
    arguments: dict[str, Any] = field(default_factory=dict)


def run(body: str, planted: Planted, order: metalsim.Order = "forward") -> tuple[torch.Tensor, torch.Tensor]:
    source = (
        HEADER
        + f"""
    template <typename T> T twice(T v) {{ return v + v; }}
    kernel void f(device float* x [[buffer(0)]], device float* y [[buffer(1)]],
                  device atomic_uint* count [[buffer(2)]], uint i [[thread_position_in_grid]],
                  uint t [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                  uint s [[simdgroup_index_in_threadgroup]], uint g [[threadgroup_position_in_grid]]) {{
        {body}
    }}"""
    )
    x = planted.arguments.get("x", torch.arange(256.0))
    y = planted.arguments.get("y", torch.zeros(256))
    with metalsim.simulate(check=True, order=order, seed=1):
        metalsim.compile_shader(source).f(
            x, y, torch.zeros(4, dtype=torch.int32), threads=planted.threads, group_size=planted.group_size
        )
    return x, y


PLANTED = {
    "load past the end": Planted(
        "y[i] = x[i + 193];",
        "y[i] = x[i + 192];",
        r"out-of-bounds load of 4 bytes at byte 1024 of argument 0 'x', which has 1024 bytes; by thread \(63, 0, 0\)",
    ),
    "load before the beginning": Planted(
        "y[i] = x[int(i) - 1];",
        "y[i] = x[max(int(i) - 1, 0)];",
        r"out-of-bounds load of 4 bytes at byte -4 of argument 0",
    ),
    "load that straddles the end": Planted(
        "y[i] = dot(float4(*(device packed_float4*)(x + 190 + i)), float4(1));",
        "y[i] = dot(float4(*(device packed_float4*)(x + 189 + i)), float4(1));",
        "out-of-bounds load of 16 bytes at byte 1012 of argument 0",
    ),
    "store past the end": Planted(
        "y[i + 200] = 1;", "y[i + 100] = 1;", "out-of-bounds store of 4 bytes at byte 1024 of argument 1 'y'"
    ),
    "wild pointer": Planted(
        "y[i] = *(device float*)(0x1234560);",
        "y[i] = *(device float*)(x);",
        "load of 4 bytes at wild address 0x1234560",
    ),
    "past a threadgroup variable": Planted(
        f"threadgroup float a[64]; threadgroup float b[64]; a[t] = 0; b[t] = 1; {TG} y[i] = a[t + 1];",
        f"threadgroup float a[64]; threadgroup float b[64]; a[t] = 0; b[t] = 1; {TG} y[i] = a[(t + 1) % 64] + b[t];",
        "out-of-bounds load of 4 bytes at byte 256 of threadgroup variable 'a'",
    ),
    "misaligned device vector": Planted(
        "y[i] = (*(device float4*)(x + i)).x;",
        "y[i] = (*(device float4*)(x + 4 * (i / 4))).x;",
        "misaligned load of 16 bytes at byte 4 of argument 0 'x'",
    ),
    "misaligned threadgroup vector": Planted(
        f"threadgroup half a[256]; *(threadgroup half4*)(a + 2 * t) = 1; {TG} y[i] = a[t];",
        f"threadgroup half a[256]; *(threadgroup half4*)(a + 4 * t) = 1; {TG} y[i] = a[t];",
        "misaligned store of 8 bytes at byte 4 of threadgroup variable 'a'",
    ),
    "misaligned view": Planted(
        "y[i] = (*(device float2*)(x)).x;",
        "y[i] = x[0];",
        "misaligned load of 8 bytes at byte 0",
        arguments={"x": torch.arange(256.0)[1:]},
    ),
    "uninitialised threadgroup memory": Planted(
        f"threadgroup float a[64]; if (t != 7) a[t] = x[i]; {TG} y[i] = a[63 - t];",
        f"threadgroup float a[64]; a[t] = x[i]; {TG} y[i] = a[63 - t];",
        r"uninitialised threadgroup memory: load of 4 bytes at byte 28 of threadgroup variable 'a', where no thread "
        "has stored; "
        r"by thread \(56, 0, 0\)",
    ),
    "threadgroup memory of the threadgroup before": Planted(
        f"threadgroup float a[64]; if (g == 0) a[t] = x[i]; {TG} y[i] = a[63 - t];",
        f"threadgroup float a[64]; if (g < 2) a[t] = x[i]; {TG} y[i] = a[63 - t];",
        r"uninitialised .* of threadgroup \(1, 0, 0\)",
        threads=128,
    ),
    "uninitialised atomic": Planted(
        "threadgroup atomic_uint a; atomic_fetch_add_explicit(&a, 1u, memory_order_relaxed);",
        f"threadgroup atomic_uint a; if (t == 0) atomic_store_explicit(&a, 0u, memory_order_relaxed); {TG}"
        "atomic_fetch_add_explicit(&a, 1u, memory_order_relaxed);",
        "uninitialised threadgroup memory: atomic operation on threadgroup variable 'a'",
    ),
    "threadgroup race: no barrier": Planted(
        "threadgroup float a[64]; a[t] = x[i]; y[i] = a[t ^ 32];",
        f"threadgroup float a[64]; a[t] = x[i]; {TG} y[i] = a[t ^ 32];",
        "data race|uninitialised",
    ),
    "threadgroup race: a second round": Planted(
        f"threadgroup float a[64]; for (int n = 0; n < 2; ++n) {{ a[t] = x[i]; {TG} y[i] = a[t ^ 32]; }}",
        f"threadgroup float a[64]; for (int n = 0; n < 2; ++n) {{ a[t] = x[i]; {TG} y[i] = a[t ^ 32]; {TG} }}",
        "data race at byte .* of threadgroup variable 'a': this (load|store) and a (load|store) by thread",
    ),
    "threadgroup race: barrier for other memory": Planted(
        "threadgroup float a[64]; a[t] = x[i]; threadgroup_barrier(mem_flags::mem_device); y[i] = a[t ^ 32];",
        "threadgroup float a[64]; a[t] = x[i]; threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);"
        "y[i] = a[t ^ 32];",
        "data race at byte .* of threadgroup variable 'a'",
    ),
    "threadgroup race: simdgroup barrier between simdgroups": Planted(
        "threadgroup float a[64]; a[t] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = a[t ^ 32];",
        "threadgroup float a[64]; a[t] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = a[t ^ 16];",
        "data race|uninitialised",
    ),
    "threadgroup race: simd operation is no barrier": Planted(
        "threadgroup float a[64]; a[t] = x[i]; float n = simd_sum(1.0f); y[i] = a[t ^ 16] + n;",
        "threadgroup float a[64]; a[t] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup);"
        "float n = simd_sum(1.0f); y[i] = a[t ^ 16] + n;",
        "data race",
    ),
    "threadgroup race: all store one word": Planted(
        f"threadgroup float a; a = x[i]; {TG} y[i] = a;",
        f"threadgroup float a; if (t == 0) a = x[i]; {TG} y[i] = a;",
        "data race at byte 0 of threadgroup variable 'a': this store and a store by thread 0",
    ),
    "device race inside a threadgroup": Planted(
        f"y[t] = x[i]; {TG} x[t] = y[t ^ 1];",
        "y[t] = x[i]; threadgroup_barrier(mem_flags::mem_device); x[t] = y[t ^ 1];",
        "data race at byte .* of argument 1 'y': this load and a store by thread",
    ),
    "device race between threadgroups": Planted(
        "y[i % 64] = x[i];",
        "y[i] = x[i];",
        r"data race .* argument 1 'y': this store and a store by thread 0 of threadgroup \(0, 0, 0\)",
        threads=128,
    ),
    "device race: load before another threadgroup's store": Planted(
        "y[i] = x[t]; if (g == 1) x[t] = 1;",
        "y[i] = x[t]; if (g == 1) x[t + 64] = 1;",
        "data race .* argument 0 'x': this store and a load by thread",
        threads=128,
    ),
    "atomic and plain access": Planted(
        "atomic_fetch_add_explicit(count, 1u, memory_order_relaxed); if (t == 40) *(device uint*)count = 3;",
        "atomic_fetch_add_explicit(count, 1u, memory_order_relaxed);",
        "data race",
        threads=128,
    ),
    "divergent threadgroup_barrier": Planted(
        f"if (t < 32) {{ {TG} y[i] = 1; }} else {{ {TG} y[i] = 2; }}",
        f"{TG} if (t < 32) {{ y[i] = 1; }} else {{ y[i] = 2; }}",
        "divergent threadgroup_barrier: thread .* waits at a barrier, but thread .* waits at another one",
    ),
    "barrier that a thread left for good": Planted(
        f"if (t == 40) return; {TG} y[i] = 1;",
        f"{TG} if (t == 40) return; y[i] = 1;",
        r"divergent threadgroup_barrier: .* but thread \(40, 0, 0\) .* has ended",
    ),
    "barrier in a loop of another length": Planted(
        f"for (uint n = 0; n < 1 + s; ++n) {{ {TG} }} y[i] = 1;",
        f"for (uint n = 0; n < 2; ++n) {{ {TG} }} y[i] = 1;",
        "divergent threadgroup_barrier",
    ),
    "divergent simdgroup_barrier": Planted(
        "if (lane < 16) simdgroup_barrier(mem_flags::mem_none); y[i] = 1;",
        "if (s < 1) simdgroup_barrier(mem_flags::mem_none); y[i] = 1;",
        "divergent simdgroup_barrier: only lanes 0x0000ffff of 0xffffffff",
    ),
    "shuffle from an inactive lane": Planted(
        "if (lane < 16) y[i] = simd_shuffle(x[i], 20);",
        "if (lane < 16) y[i] = simd_shuffle(x[i], 10);",
        "simd_shuffle: lane 0 reads from lane 20, which does not take part",
    ),
    "shuffle_down across a divergent branch": Planted(
        "if (lane % 2) y[i] = simd_shuffle_down(x[i], 1);",
        "if (lane % 2) y[i] = simd_shuffle_down(x[i], 2);",
        "simd_shuffle_down: lane 1 reads from lane 2",
    ),
    "matrix operation in part of a simdgroup": Planted(
        "simdgroup_float8x8 m; if (lane < 16) { simdgroup_load(m, x); simdgroup_store(m, y); }",
        "simdgroup_float8x8 m; if (s < 1) { simdgroup_load(m, x); simdgroup_store(m, y); }",
        "divergent simdgroup matrix operation: only lanes 0x0000ffff",
    ),
    "too much threadgroup memory": Planted(
        "threadgroup float a[8192]; threadgroup float b; a[t] = 1; b = 1;",
        "threadgroup float a[8191]; threadgroup float b; a[t] = 1; if (t == 0) b = 1;",
        "threadgroup memory: 'b' brings it to 32772 bytes, more than the limit of 32768",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_reported(name: str) -> None:
    planted = PLANTED[name]
    before = planted.arguments.get("x", torch.arange(256.0)).clone()
    with pytest.raises(metalsim.KernelError, match=planted.says) as caught:
        run(planted.bug, planted)
    assert "kernel 'f'" in str(caught.value) and "thread (" in str(caught.value)
    torch.testing.assert_close(planted.arguments.get("x", before), before)


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("order", metalsim.ORDERS)
def test_repaired_kernel_passes(name: str, order: metalsim.Order) -> None:
    run(PLANTED[name].repaired, PLANTED[name], order)


@pytest.mark.parametrize("order", ["reverse", "random"])
@pytest.mark.parametrize("name", [n for n in PLANTED if "race" in n or "barrier" in n])
def test_races_are_found_in_every_order(name: str, order: metalsim.Order) -> None:
    """A race is a missing barrier, not an unlucky order of threads."""
    with pytest.raises(metalsim.KernelError, match=r"data race|uninitialised|divergent"):
        run(PLANTED[name].bug, PLANTED[name], order)


@pytest.mark.parametrize("name", ["barrier that a thread left for good", "divergent threadgroup_barrier"])
def test_unchecked_runs_report_divergent_barriers_too(name: str) -> None:
    source = (
        HEADER
        + f"""
    kernel void f(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]],
                  uint t [[thread_index_in_threadgroup]]) {{ {PLANTED[name].bug} }}"""
    )
    with pytest.raises(metalsim.KernelError, match="divergent threadgroup_barrier"):
        metalsim.compile_shader(source).f(torch.zeros(64), threads=64, group_size=64)
