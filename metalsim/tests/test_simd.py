"""Simd operations, and which lane holds which elements of a matrix."""

from __future__ import annotations

import pytest
import torch

import metalsim

HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"


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


def test_divergent_lanes_meet_again() -> None:
    """Operations in branches, loops of different lengths and after an early return see the lanes that are there."""
    source = (
        HEADER
        + """
    kernel void f(device float* out [[buffer(0)]], uint lane [[thread_index_in_simdgroup]]) {
        float s = 0;
        for (uint i = 0; i < lane % 3; ++i) s += 100 * simd_sum(1.0f);
        s += simd_sum(1.0f);
        if (lane % 2) s += 10000 * simd_max(float(lane)); else s += 10000 * simd_min(float(lane));
        out[lane] = s;
        if (lane >= 20) return;
        out[lane] = s + 1000000 * simd_sum(1.0f);
    }"""
    )
    once, twice = sum(n % 3 >= 1 for n in range(32)), sum(n % 3 == 2 for n in range(32))
    for order in metalsim.ORDERS:
        out = torch.zeros(32)
        with metalsim.simulate(order=order):
            metalsim.compile_shader(source).f(out, threads=32, group_size=32)
        for lane in range(32):
            turns = 100 * (once * (lane % 3 >= 1) + twice * (lane % 3 == 2))
            assert out[lane] == turns + 32 + 10000 * (31 if lane % 2 else 0) + 1000000 * (20 if lane < 20 else 0)


def test_integer_reductions() -> None:
    x = RANGE.int()
    assert lanes("simd_and(x | 64)", x, "int").tolist() == [64] * 32
    assert lanes("simd_or(x)", x, "int").tolist() == [31] * 32
    assert lanes("simd_xor(x)", x, "int").tolist() == [0] * 32
    assert lanes("popcount(x) + clz(x) + ctz(x)", x, "int")[12].item() == 2 + 28 + 2


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
