"""The estimate of registers, and what fast math leaves undefined."""

from __future__ import annotations

import pytest

import metalsim

KEPT = """
#include <metal_stdlib>
using namespace metal;
kernel void keep(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) {{
    float a[{count}];
    for (int j = 0; j < {count}; j++) a[j] = x[i * {count} + j];
    simdgroup_barrier(mem_flags::mem_device);
    for (int j = 0; j < {count}; j++) x[i * {count} + j] = a[{count} - 1 - j];
}}
"""


def test_values_that_live_across_a_barrier_are_counted() -> None:
    few, many, too_many = (metalsim.count_registers(KEPT.format(count=count))["keep"] for count in (8, 64, 160))
    assert 8 <= few.used <= 40 and 64 <= many.used <= 120 and too_many.used >= 160
    assert few.spilled_bytes == many.spilled_bytes == 0
    assert too_many.spilled_bytes >= 4 * (160 - 128)


def test_the_limit_can_be_another() -> None:
    source = KEPT.format(count=64)
    assert metalsim.count_registers(source, limit=48)["keep"].spilled_bytes >= 4 * (64 - 48)


def test_every_kernel_of_a_source_is_counted() -> None:
    source = KEPT.format(count=8) + "kernel void one(device float* x [[buffer(0)]]) { x[0] = simd_sum(tanh(x[0])); }"
    counted = metalsim.count_registers(source)
    assert list(counted) == ["keep", "one"] and 0 < counted["one"].used < counted["keep"].used


def test_what_does_not_compile_has_no_registers() -> None:
    with pytest.raises(metalsim.CompileError):
        metalsim.count_registers("kernel void f(device float* x [[buffer(0)]]) { x[0] = y; }")


@pytest.mark.parametrize(
    "expression, found",
    (
        ("-INFINITY", ["line 5: INFINITY is undefined under fast math"]),
        ("isnan(x[i]) ? NAN : x[i]", [f"line 5: {word} is undefined under fast math" for word in ("isnan", "NAN")]),
        ("numeric_limits<float>::infinity()", ["line 5: infinity is undefined under fast math"]),
        ("LOWEST", ["line 5: INFINITY is undefined under fast math"]),
        ("as_type<float>(0x7f800000u)", []),
    ),
)
def test_infinities(expression: str, found: list[str]) -> None:
    source = f"""#include <metal_stdlib>
#define LOWEST (-INFINITY)
using namespace metal;
kernel void f(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) {{
    x[i] = {expression};  // INFINITY
}}
"""
    assert metalsim.infinities(source) == found
