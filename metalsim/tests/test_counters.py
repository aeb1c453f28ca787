"""Counters: exact, repeatable, and the same in every order of threads."""

from __future__ import annotations

import pytest
import torch

import metalsim

HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"


def count(
    body: str,
    threads: int = 32,
    group_size: int = 32,
    order: metalsim.Order = "forward",
    x: torch.Tensor | None = None,
) -> metalsim.Counters:
    source = (
        HEADER
        + f"""
    kernel void f(device float* x [[buffer(0)]], device float* y [[buffer(1)]], constant uint& n [[buffer(2)]],
                  uint i [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {{ {body} }}"""
    )
    x = torch.zeros(4096) if x is None else x
    with metalsim.simulate(order=order) as run:
        metalsim.compile_shader(source).f(x, torch.zeros(4096), 7, threads=threads, group_size=group_size)
    return run.dispatches[0].counters


@pytest.mark.parametrize("order", metalsim.ORDERS)
@pytest.mark.parametrize(
    "body, instructions, transactions, requested, unique",
    [
        ("y[i] = x[i];", 1, 1, 128, 128),  # a full line
        ("y[i] = x[i + 1];", 1, 2, 128, 128),  # straddles two
        ("y[i] = x[2 * i];", 1, 2, 128, 128),  # half of each line is used
        ("y[i] = x[32 * i];", 1, 32, 128, 128),  # a line for each lane
        ("y[i] = x[5];", 1, 1, 128, 4),  # all lanes load one word
        ("y[i] = x[i / 4];", 1, 1, 128, 32),
        ("float4 v = ((device float4*)x)[i]; y[i] = v.x + v.y * v.z - v.w;", 1, 4, 512, 512),
        ("float4 v = *(device packed_float4*)(x + 4 * i); y[i] = v.x + v.y * v.z - v.w;", 1, 4, 512, 512),
        ("y[i] = x[i]; if (lane < 8) y[i + 64] = x[i + 64];", 2, 2, 160, 160),
        ("if (lane % 2) y[i] = x[i]; else y[i] = exp2(x[i + 64]);", 2, 2, 128, 128),
        # lanes of one loop agree on its n-th turn, however long each runs
        (
            "float s = 0; for (uint j = 0; j <= lane; ++j) s += x[32 * j + lane]; y[i] = s;",
            32,
            32,
            2112,
            2112,
        ),
        (
            "float s = 0; for (int j = 0; j < 4; ++j) s = simd_sum(s + x[32 * j + lane]); y[i] = s;",
            4,
            4,
            512,
            512,
        ),
    ],
)
def test_loads(body: str, instructions: int, transactions: int, requested: int, unique: int, order: metalsim.Order) -> None:
    c = count(body, order=order)
    assert (c.load_instructions, c.load_transactions) == (instructions, transactions)
    assert (c.device_bytes_loaded, c.unique_bytes_loaded) == (requested, unique)
    assert c.load_efficiency == unique / (128 * transactions)


def test_a_view_is_counted_from_where_it_lies() -> None:
    assert count("y[i] = x[i];", x=torch.zeros(100)[1:]).load_transactions == 2


def test_stores() -> None:
    c = count("y[i] = 1; if (lane < 3) x[2 * i] = 2;")
    assert (c.store_instructions, c.store_transactions) == (2, 2)
    assert (c.device_bytes_stored, c.unique_bytes_stored) == (140, 140)
    assert c.device_bytes_loaded == 0


def test_numbers_passed_by_the_host_are_not_counted() -> None:
    assert count("y[i] = n;").device_bytes_loaded == 0


def test_operations() -> None:
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    c = count(
        f"""threadgroup float s[64]; s[i % 64] = 1; {barrier} float v = s[63 - i % 64]; {barrier}
        v = simd_sum(v) + simd_shuffle_xor(v, 1);
        simdgroup_barrier(mem_flags::mem_none);
        simdgroup_float8x8 a, b, c = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        simdgroup_load(a, x); simdgroup_load(b, x + 64);
        simdgroup_multiply_accumulate(c, a, b, c);
        y[i] = v + c.thread_elements()[0];""",
        threads=128,
        group_size=64,
    )
    assert (c.threads, c.simdgroups, c.threadgroups) == (128, 4, 2)
    assert c.simd_operations == 2 * 4
    assert c.simdgroup_barriers == 4
    assert c.threadgroup_barriers == 2 * 2
    assert (c.matrix_operations, c.matrix_multiplies) == (3 * 4, 4)
    assert (c.threadgroup_bytes_stored, c.threadgroup_bytes_loaded) == (4 * 128, 4 * 128)
    # each matrix is loaded in one instruction of 256 bytes, all used
    assert (c.load_instructions, c.load_transactions, c.load_efficiency) == (2 * 4, 4 * 4, 1.0)


def test_divergent_simd_operations_count_once_for_each_branch() -> None:
    assert count("if (lane < 8) y[i] = simd_sum(1.0f); else y[i] = simd_max(2.0f);").simd_operations == 2


def test_atomics() -> None:
    assert count("atomic_fetch_add_explicit((device atomic_float*)x, 1.0f, memory_order_relaxed);").atomic_operations == 32


def test_counters_add() -> None:
    c = count("y[i] = x[i];")
    assert (c + c).device_bytes_loaded == 2 * c.device_bytes_loaded


def test_dispatch_is_described() -> None:
    source = (
        HEADER
        + """kernel void f(device float* x [[buffer(0)]], uint2 i [[thread_position_in_grid]]) {
        threadgroup half a[100]; a[i.x % 8] = 1; x[i.y * 16 + i.x] = 1; }"""
    )
    with metalsim.simulate() as run:
        library = metalsim.compile_shader(source)
        library.f(torch.zeros(64), threads=(16, 4), group_size=(8, 1))
        library.f(torch.zeros(64), threads=(16, 1), group_size=(8, 1))
    first, second = run.dispatches
    assert (first.kernel, first.threads, first.group_size) == ("f", (16, 4, 1), (8, 1, 1))
    assert first.threadgroup_bytes == 200
    assert (first.counters.threadgroups, second.counters.threadgroups) == (8, 2)
