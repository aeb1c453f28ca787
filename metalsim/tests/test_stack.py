"""Arrays that do not stay in registers are named."""

from __future__ import annotations

import pytest

import metalsim

KERNEL = """
#include <metal_stdlib>
using namespace metal;
kernel void choose(device float* x [[buffer(0)]], constant int& n [[buffer(1)]], uint i [[thread_position_in_grid]]) {{
    float a[4];
    for (int j = 0; j < 4; j++) a[j] = x[4 * i + j];
    {body}
}}
"""


@pytest.mark.parametrize(
    "body, says",
    (
        ("x[i] = i & 1 ? a[2] : a[0];", "line 7: a choice between elements"),
        ("x[i] = i & 1 ? (a[2]) : (a[0]);", "line 7: a choice between elements"),
        ("x[i] = a[n & 3];", "an array of 4 x float stays in memory"),
    ),
)
def test_found(body: str, says: str) -> None:
    found = metalsim.stack_arrays(KERNEL.format(body=body))
    assert any(says in line for line in found)


@pytest.mark.parametrize(
    "body",
    (
        "const float even = a[0], odd = a[2]; x[i] = i & 1 ? odd : even;",
        "x[i] = i & 1 ? x[2] : x[0];",
        "float sum = 0.0f; for (int j = 0; j < 4; j++) sum += a[j]; x[i] = sum;",
    ),
)
def test_not_found(body: str) -> None:
    assert metalsim.stack_arrays(KERNEL.format(body=body)) == []
