"""Arguments, sizes and orders of a launch, as torch.mps.compile_shader has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import metalsim

HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"


def library(kernels: str) -> metalsim.Library:
    return metalsim.compile_shader(HEADER + kernels)


COPY = "kernel void f(device const {0}* x [[buffer(0)]], device {0}* y [[buffer(1)]], uint i [[thread_position_in_grid]])"


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("float", torch.float32), ("half", torch.float16), ("bfloat", torch.bfloat16), ("int", torch.int32),
        ("long", torch.int64), ("uchar", torch.uint8), ("bool", torch.bool), ("short", torch.int16), ("char", torch.int8),
    ],
)  # fmt: skip
def test_tensors_of_every_type(kind: str, dtype: torch.dtype, check: bool) -> None:
    x = torch.arange(70).to(dtype)
    y = torch.zeros(70, dtype=dtype)
    with metalsim.simulate(check=check):
        library(COPY.format(kind) + "{ y[i] = x[i]; }").f(x, y)  # threads: the numel of the first tensor
    assert torch.equal(x, y)


@pytest.mark.parametrize("check", [False, True])
def test_views_bind_from_their_storage_offset(check: bool) -> None:
    base = torch.arange(100.0).view(10, 10)
    y = torch.zeros(50)
    with metalsim.simulate(check=check):
        library(COPY.format("float") + "{ y[i] = x[i * 10]; }").f(base[2:, 3], y[5:], threads=8, group_size=8)
    assert torch.equal(y[5:13], base[2:, 3])
    assert not y[:5].any() and not y[13:].any()


@pytest.mark.parametrize("order", metalsim.ORDERS)
@pytest.mark.parametrize("check", [False, True])
def test_overlapping_tensors_are_one_memory(check: bool, order: metalsim.Order) -> None:
    """K and V as views of one allocation: what is stored through one is visible through the other."""
    allocation = torch.zeros(2, 4, 8)
    k, v = allocation[0], allocation[1]
    f = library(
        """kernel void f(device float* k [[buffer(0)]], device float* v [[buffer(1)]], device float* out [[buffer(2)]],
        uint i [[thread_position_in_grid]]) {
            k[32 + i] = i; threadgroup_barrier(mem_flags::mem_device); out[i] = v[31 - i]; }"""
    ).f
    out = torch.zeros(32)
    with metalsim.simulate(check=check, order=order):
        f(k, v, out, threads=32, group_size=32)
    assert torch.equal(v.flatten(), torch.arange(32.0))
    assert torch.equal(out, torch.arange(31.0, -1, -1))
    assert not k.any()


NUMBERS = """
kernel void integer(device long* y [[buffer(0)]], constant {0}& v [[buffer(1)]]) {{ y[0] = v; }}
kernel void real(device float* y [[buffer(0)]], constant {1}& v [[buffer(1)]]) {{ y[0] = v; }}
kernel void many(device float* y [[buffer(0)]], constant {1}* v [[buffer(1)]], uint i [[thread_position_in_grid]])
    {{ y[i] = v[i]; }}
"""


@pytest.mark.parametrize(
    "cast, integer, real",
    [(None, "long", "float"), ("int32", "int", "int"), ("int16", "short", "short"), ("int8", "char", "char"),
     ("uint8", "uchar", "uchar"), ("fp16", "half", "half"), ("bf16", "bfloat", "bfloat")],
)  # fmt: skip
def test_numbers(cast: str | None, integer: str, real: str) -> None:
    lib = library(NUMBERS.format(integer, real))
    whole = real not in ("float", "half", "bfloat")
    with metalsim.simulate():
        y = torch.zeros(1, dtype=torch.int64)
        lib.integer(y, 5, threads=1, group_size=1, arg_casts=cast)
        assert y.item() == 5
        z = torch.zeros(3)
        lib.real(z, 2.5, threads=1, group_size=1, arg_casts={1: cast} if cast else None)
        assert z[0].item() == (2 if whole else 2.5)
        lib.many(z, (1.5, 2.0, -3.0) if not cast else [1.5, 2.0, 3.0], threads=3, group_size=3, arg_casts=cast)
        assert z[1].item() == 2 and z[0].item() == (1 if whole else 1.5)


@pytest.mark.parametrize(
    "argument, says",
    [(None, "unsupported argument type NoneType"), ("x", "unsupported argument type str"), ([], "an empty list"),
     ([None], "unsupported argument type"), (2**70, "the argument .* does not fit")],
)  # fmt: skip
def test_rejected_arguments(argument: Any, says: str) -> None:
    lib = library(NUMBERS.format("long", "float"))
    with pytest.raises(metalsim.LaunchError, match=f"kernel 'integer', argument 1: {says}"):
        lib.integer(torch.zeros(1, dtype=torch.int64), argument, threads=1)


def test_rejected_cast() -> None:
    with pytest.raises(metalsim.LaunchError, match="unsupported cast 'int3'"):
        library(NUMBERS.format("long", "float")).integer(torch.zeros(1), 1, threads=1, arg_casts="int3")


@pytest.mark.parametrize(
    "sizes, says",
    [
        ({"threads": 2048, "group_size": 1025}, "a threadgroup of 1025 threads"),
        ({"threads": (64, 64), "group_size": (64, 32)}, "a threadgroup of 2048 threads"),
        ({"threads": 8, "group_size": 0}, "a threadgroup of 0 threads"),
        ({"threads": (8, 8), "group_size": 8}, "different numbers of dimensions"),
        ({"threads": (1, 1, 1, 1)}, "one to three"),
    ],
)
def test_rejected_sizes(sizes: dict[str, Any], says: str) -> None:
    with pytest.raises(metalsim.LaunchError, match=says):
        library(COPY.format("float") + "{ y[i] = x[i]; }").f(torch.zeros(4), torch.zeros(4), **sizes)


def test_too_many_arguments() -> None:
    f = library(COPY.format("float") + "{ y[i] = x[i]; }").f
    with pytest.raises(metalsim.LaunchError, match="32 arguments, Metal binds 31 at most"):
        f(*[torch.zeros(4)] * 32)


def test_missing_argument() -> None:
    f = library(COPY.format("float") + "{ y[i] = x[i]; }").f
    with pytest.raises(metalsim.LaunchError, match=r"kernel 'f': no argument for parameter 'y' \[\[buffer\(1\)\]\]"):
        f(torch.zeros(4), threads=4)


def test_unknown_kernel() -> None:
    lib = library(COPY.format("float") + "{ y[i] = x[i]; }")
    assert dir(lib) == ["f"]
    with pytest.raises(AttributeError, match="no kernel named 'g'; there are f"):
        _ = lib.g


def test_a_number_too_short_for_its_parameter_is_out_of_bounds() -> None:
    f = library("kernel void f(device int* y [[buffer(0)]], constant long& n [[buffer(1)]]) { y[0] = n; }").f
    with (
        metalsim.simulate(),
        pytest.raises(metalsim.KernelError, match=r"out-of-bounds load of 8 bytes .* argument 1 'n'"),
    ):
        f(torch.zeros(1, dtype=torch.int32), 3, threads=1, arg_casts="int32")


def test_positions_and_uneven_grids() -> None:
    lib = library(
        """
    kernel void f(device int* y [[buffer(0)]], uint3 p [[thread_position_in_grid]],
                  uint3 t [[thread_position_in_threadgroup]], uint3 g [[threadgroup_position_in_grid]],
                  uint3 size [[threads_per_threadgroup]],
                  uint3 full [[dispatch_threads_per_threadgroup]], uint3 groups [[threadgroups_per_grid]],
                  uint3 grid [[threads_per_grid]], ushort lane [[thread_index_in_simdgroup]],
                  ushort s [[simdgroup_index_in_threadgroup]], ushort n [[simdgroups_per_threadgroup]],
                  uint index [[thread_index_in_threadgroup]], uint width [[threads_per_simdgroup]]) {
        device int* out = y + ((p.z * grid.y + p.y) * grid.x + p.x) * 12;
        out[0] = all(g * full + t == p);
        out[1] = size.x; out[2] = size.y; out[3] = size.z;
        out[4] = groups.x * 100 + groups.y * 10 + groups.z;
        out[5] = index == (t.z * size.y + t.y) * size.x + t.x;
        out[6] = lane == index % 32; out[7] = s == index / 32; out[8] = n;
        out[9] = width; out[10] = full.x; out[11] = simd_sum(1);
    }"""
    )
    grid, group = (20, 5, 3), (8, 4, 2)
    y = torch.zeros(3, 5, 20, 12, dtype=torch.int32)
    for order in metalsim.ORDERS:
        with metalsim.simulate(order=order):
            lib.f(y, threads=grid, group_size=group)
        assert (y[..., [0, 5, 6, 7]] == 1).all()
        assert (y[..., 4] == 322).all() and (y[..., 9] == 32).all() and (y[..., 10] == 8).all()
        assert y[0, 0, 0, 1:4].tolist() == [8, 4, 2] and y[2, 4, 19, 1:4].tolist() == [4, 1, 1]
        assert y[0, 0, 0, 8].item() == 2 and y[2, 4, 19, 8].item() == 1
        assert y[0, 0, 0, 11].item() == 32 and y[2, 4, 19, 11].item() == 4


def test_buffers_without_an_index_are_numbered_in_order() -> None:
    lib = library(
        "kernel void f(device const float* a, device float* c [[buffer(2)]], device const float* b,"
        "uint i [[thread_position_in_grid]]) { c[i] = a[i] - b[i]; }"
    )
    c = torch.zeros(4)
    lib.f(torch.full((4,), 5.0), torch.full((4,), 2.0), c, threads=4)
    assert torch.equal(c, torch.full((4,), 3.0))


def test_host_names_of_templates() -> None:
    lib = library(
        """
    template <typename T, int N>
    [[kernel]] void fill(device T* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i] = T(N); }
    template [[host_name("fill_half_2")]] [[kernel]] void fill<half, 2>(
        device half* y [[buffer(0)]], uint i [[thread_position_in_grid]]);
    #define instantiate(name, T, n) template [[host_name("fill_" #name "_" #n)]] kernel void fill<T, n>(device T*, uint);
    instantiate(float, float, 3)
    template [[host_name("fill_bfloat_4")]] [[kernel]] decltype(fill<bfloat, 4>) fill<bfloat, 4>;
    [[kernel, max_total_threads_per_threadgroup(64)]] void limited(device float* y [[buffer(0)]]) { y[0] = 8; }
    [[host_name("plain")]] kernel void implementation(device float* y [[buffer(0)]]) { y[0] = 9; }
    """
    )
    assert dir(lib) == ["fill_bfloat_4", "fill_float_3", "fill_half_2", "limited", "plain"]
    for name, dtype, value in [
        ("half_2", torch.float16, 2),
        ("float_3", torch.float32, 3),
        ("bfloat_4", torch.bfloat16, 4),
    ]:
        y = torch.zeros(5, dtype=dtype)
        getattr(lib, f"fill_{name}")(y)
        assert (y == value).all()


def test_results_that_depend_on_the_order() -> None:
    f = library(
        """kernel void f(device atomic_int* count [[buffer(0)]], device int* y [[buffer(1)]],
        uint i [[thread_position_in_grid]]) { y[i] = atomic_fetch_add_explicit(count, 1, memory_order_relaxed); }
        kernel void g(device int* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i] = i; }"""
    )

    def tickets() -> list[torch.Tensor]:
        y = torch.zeros(64, dtype=torch.int32)
        f.f(torch.zeros(1, dtype=torch.int32), y, threads=64, group_size=32)
        return [y]

    def indices() -> list[torch.Tensor]:
        y = torch.zeros(64, dtype=torch.int32)
        f.g(y, threads=64, group_size=32)
        return [y]

    with pytest.raises(metalsim.KernelError, match="result 0 depends on the order of threads"):
        metalsim.in_every_order(tickets)
    assert metalsim.in_every_order(indices)[0].tolist() == list(range(64))


def test_random_order_follows_its_seed() -> None:
    f = library(
        """kernel void f(device atomic_int* count [[buffer(0)]], device int* y [[buffer(1)]],
        uint i [[thread_position_in_grid]]) { y[i] = atomic_fetch_add_explicit(count, 1, memory_order_relaxed); }"""
    ).f

    def tickets(order: metalsim.Order, seed: int) -> list[int]:
        y = torch.zeros(64, dtype=torch.int32)
        with metalsim.simulate(check=False, order=order, seed=seed):
            f(torch.zeros(1, dtype=torch.int32), y, threads=64, group_size=32)
        return y.tolist()

    assert tickets("forward", 0) == list(range(64))
    assert tickets("reverse", 0) == list(range(63, -1, -1))
    assert tickets("random", 1) == tickets("random", 1) != tickets("random", 2)
    assert sorted(tickets("random", 1)) == list(range(64))


def test_an_unchecked_and_a_checked_run_agree() -> None:
    f = library(COPY.format("float") + "{ y[i] = exp2(x[i]) * simd_sum(x[i]); }").f
    x, results = torch.randn(64), []
    for check in (False, True):
        y = torch.zeros(64)
        with metalsim.simulate(check=check):
            f(x, y, group_size=32, threads=64)
        results.append(y)
    assert torch.equal(*results)
