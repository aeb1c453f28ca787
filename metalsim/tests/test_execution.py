"""What kernels compute: simd operations, matrices, threadgroup memory, types, templates."""

from __future__ import annotations

import pytest
import torch

import metalsim

HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"
DTYPES = {"float": torch.float32, "half": torch.float16, "bfloat": torch.bfloat16}
TOLERANCE = {"float": 1e-5, "half": 2e-3, "bfloat": 2e-2}


def lanes(expression: str, x: torch.Tensor, kind: str = "float", out: torch.dtype | None = None) -> torch.Tensor:
    """`expression` of each lane's value x, over one simdgroup."""
    source = (
        HEADER
        + f"""
    kernel void f(device const {kind}* in [[buffer(0)]], device {"int" if out else kind}* out [[buffer(1)]],
                  uint lane [[thread_index_in_simdgroup]]) {{ {kind} x = in[lane]; out[lane] = {expression}; }}"""
    )
    result = torch.empty_like(x, dtype=out or x.dtype)
    metalsim.compile_shader(source).f(x, result, threads=32, group_size=32)
    return result


RANGE = torch.arange(32)


@pytest.mark.parametrize(
    "expression, expected",
    [
        ("simd_sum(x)", torch.full((32,), 496.0)),
        ("simd_max(x)", torch.full((32,), 31.0)),
        ("simd_min(x)", torch.zeros(32)),
        ("simd_product(x == 0 ? 1.0f : x == 3 ? 3.0f : 1.0f)", torch.full((32,), 3.0)),
        ("simd_prefix_inclusive_sum(x)", RANGE.float().cumsum(0)),
        ("simd_prefix_exclusive_sum(x)", RANGE.float().cumsum(0) - RANGE),
        ("simd_shuffle(x, 5)", torch.full((32,), 5.0)),
        ("simd_broadcast(x, 7)", torch.full((32,), 7.0)),
        ("simd_broadcast_first(x + 2)", torch.full((32,), 2.0)),
        ("simd_shuffle_xor(x, 9)", (RANGE ^ 9).float()),
        ("simd_shuffle_down(x, 4)", torch.where(RANGE < 28, RANGE + 4, RANGE).float()),
        ("simd_shuffle_up(x, 4)", torch.where(RANGE >= 4, RANGE - 4, RANGE).float()),
        ("simd_shuffle_rotate_down(x, 4)", ((RANGE + 4) % 32).float()),
        ("simd_shuffle_rotate_up(x, 4)", ((RANGE - 4) % 32).float()),
        (
            "simd_shuffle_and_fill_down(x, -x, 4)",
            torch.where(RANGE < 28, RANGE + 4, -((RANGE + 4) % 32)).float(),
        ),
        ("quad_sum(x)", (RANGE // 4 * 16 + 6).float()),
        ("quad_max(x)", (RANGE // 4 * 4 + 3).float()),
        ("quad_broadcast(x, 2)", (RANGE // 4 * 4 + 2).float()),
        ("quad_shuffle_xor(x, 1)", (RANGE ^ 1).float()),
        ("quad_shuffle_down(x, 1)", torch.where(RANGE % 4 < 3, RANGE + 1, RANGE).float()),
        ("float(simd_ballot(x < 5) == 31ul)", torch.ones(32)),
        ("float(simd_any(x == 5)) + 2 * float(simd_all(x < 5))", torch.ones(32)),
        ("float(quad_any(x == 5))", (RANGE // 4 == 1).float()),
        ("x < 8 ? simd_sum(x) : simd_max(-x)", torch.where(RANGE < 8, 28.0, -8.0)),
    ],
)
def test_simd_operation(expression: str, expected: torch.Tensor) -> None:
    torch.testing.assert_close(lanes(expression, RANGE.float()), expected)


def test_integer_reductions() -> None:
    x = RANGE.int()
    assert lanes("simd_and(x | 64)", x, "int").tolist() == [64] * 32
    assert lanes("simd_or(x)", x, "int").tolist() == [31] * 32
    assert lanes("simd_xor(x)", x, "int").tolist() == [0] * 32
    assert lanes("popcount(x) + clz(x) + ctz(x)", x, "int")[12].item() == 2 + 28 + 2


MATMUL = (
    HEADER
    + """
// Each simdgroup computes one 8x8 tile of C = A B^T; B goes through threadgroup memory.
template <typename T>
kernel void matmul(device const T* a [[buffer(0)]], device const T* b [[buffer(1)]], device float* c [[buffer(2)]],
                   constant int3& mnk [[buffer(3)]], uint2 tile [[threadgroup_position_in_grid]],
                   ushort lane [[thread_index_in_simdgroup]]) {
    threadgroup T bt[8 * 12];
    simdgroup_matrix<T, 8, 8> ma, mb;
    simdgroup_matrix<float, 8, 8> sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    const int n = mnk.y, k = mnk.z;
    for (int at = 0; at < k; at += 8) {
        simdgroup_barrier(mem_flags::mem_threadgroup);
        for (int i = lane; i < 64; i += 32) bt[i / 8 * 12 + i % 8] = b[(tile.x * 8 + i / 8) * k + at + i % 8];
        simdgroup_barrier(mem_flags::mem_threadgroup);
        simdgroup_load(ma, a + tile.y * 8 * k + at, k);
        simdgroup_load(mb, bt, 12, ulong2(0, 0), true);
        simdgroup_multiply_accumulate(sum, ma, mb, sum);
    }
    simdgroup_store(sum, c + tile.y * 8 * n + tile.x * 8, n);
}
template [[host_name("matmul_float")]] [[kernel]] void matmul<float>(device const float*, device const float*,
    device float*, constant int3&, uint2, ushort);
#define instantiate(T) template [[host_name("matmul_" #T)]] [[kernel]] decltype(matmul<T>) matmul<T>;
instantiate(half)
instantiate(bfloat)
"""
)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("check", [False, True])
def test_simdgroup_matrix_matmul(kind: str, check: bool) -> None:
    m, n, k = 24, 16, 40
    a, b = torch.randn(m, k).to(DTYPES[kind]), torch.randn(n, k).to(DTYPES[kind])
    c = torch.empty(m, n)
    with metalsim.simulate(check=check):
        kernel = getattr(metalsim.compile_shader(MATMUL), f"matmul_{kind}")
        kernel(a, b, c, [m, n, k, 0], threads=(n // 8 * 32, m // 8), group_size=(32, 1), arg_casts="int32")
    torch.testing.assert_close(c, a.float() @ b.float().T, rtol=1e-5, atol=1e-5)


def test_matrix_layout() -> None:
    """thread_elements() of lane l are the elements Apple's GPUs keep there."""
    source = (
        HEADER
        + """
    kernel void f(device const float* in [[buffer(0)]], device float2* out [[buffer(1)]],
                  ushort lane [[thread_index_in_simdgroup]]) {
        simdgroup_float8x8 m;
        simdgroup_load(m, in, 8);
        out[lane] = m.thread_elements();
    }"""
    )
    out = torch.empty(32, 2)
    metalsim.compile_shader(source).f(torch.arange(64.0), out, threads=32, group_size=32)
    for lane in range(32):
        quad = lane // 4
        row, column = (quad & 4) + lane // 2 % 4, (quad & 2) * 2 + lane % 2 * 2
        assert out[lane].tolist() == [row * 8 + column, row * 8 + column + 1]
