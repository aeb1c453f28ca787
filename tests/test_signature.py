"""What calls share: the native function and Python must tell the same calls apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from struct import pack
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from pagedflash import signature as module
from pagedflash.signature import addresses_of, signature

BASE = torch.zeros(2, 3, 4)
DIFFERENT_TENSORS = [
    None,
    BASE,
    torch.zeros(2, 3, 5),
    torch.zeros(2, 12),
    torch.zeros(2, 4, 3).transpose(1, 2),
    torch.zeros(4, 3, 4)[::2],
    torch.zeros(()),
    torch.zeros(0),
    torch._neg_view(torch.zeros(2, 3, 4)),
    *(
        torch.zeros(2, 3, 4, dtype=dtype)
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8)
    ),
    *(torch.zeros(2, 3, 4, dtype=dtype) for dtype in (torch.int32, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)),
]
DIFFERENT_OPTIONS = [(), (0,), (1,), (-1,), (1.0,), (0.0,), (True,), (False,), (None,), (1, 2), ((1, 2),), ((1,), 2)]
DIFFERENT_OPTIONS += [(2**40,)]


@pytest.fixture(params=["native", "Python"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways to read a signature. The library is built wherever tests run."""
    assert module.native is not None
    if request.param == "Python":
        monkeypatch.setattr(module, "native", None)
    yield request.param


def key(tensors: tuple[Any, ...], options: tuple[Any, ...] = ()) -> Any:
    found = signature(tensors, options)
    assert found is not None
    return found[0]


def test_addresses_and_values_are_not_part_of_it(reader: str) -> None:
    for tensor in filter(torch.is_tensor, DIFFERENT_TENSORS):
        other = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        other = torch._neg_view(other) if tensor.is_neg() else other
        assert key((tensor, None), (1, 0.5)) == key((other, None), (1, 0.5))
    assert key((BASE,)) == key((torch.nn.Parameter(BASE.clone(), requires_grad=False),))


def test_everything_else_is(reader: str) -> None:
    tensors = [key((tensor,)) for tensor in DIFFERENT_TENSORS]
    options = [key((BASE,), option) for option in DIFFERENT_OPTIONS]
    counts = [key((None,) * count) for count in range(5)]
    for kinds in (tensors, options, counts):
        assert len(set(kinds)) == len(kinds)
    for a, b in itertools.permutations(DIFFERENT_TENSORS, 2):
        assert key((a, b)) != key((b, a))


def test_requests_for_gradients_count_where_they_are_tracked(reader: str) -> None:
    wanted = BASE.clone().requires_grad_()
    with torch.enable_grad():
        assert key((wanted,)) != key((BASE,))
        tracked = key((BASE,))
    with torch.no_grad():
        assert key((wanted,)) == key((BASE,)) != tracked


def test_no_telling(reader: str) -> None:
    class Subclass(torch.Tensor):
        pass

    with FakeTensorMode():
        fake = torch.zeros(3)
    for tensors in ((fake,), (BASE.as_subclass(Subclass),), (3,), ("q",)):
        assert signature(tensors, ()) is None
    for options in (("causal",), (BASE,), ([1, 2],), ((1, [2]),), (object(),)):
        assert signature((BASE,), options) is None


def test_what_only_python_reads() -> None:
    for tensors, options in (
        ((BASE,), (2**70,)),
        ((torch.zeros((1,) * 60),) * 5, ()),
        ((torch.zeros(2, device="meta"),), ()),
    ):
        key, addresses = signature(tensors, options) or (None, None)
        assert key is not None and addresses is None


def test_addresses() -> None:
    tensors = (BASE, None, BASE[1], torch.zeros(0))
    found = signature(tensors, ())
    assert found is not None
    assert found[1] == addresses_of(*tensors) == pack("4P", BASE.data_ptr(), 0, BASE[1].data_ptr(), 0)


def test_no_reference_is_lost_or_kept() -> None:
    import sys

    objects = (BASE, torch.Tensor, torch.nn.Parameter, None, True, int, tuple)
    with torch.enable_grad():
        signature((BASE, None), (1, (2, 0.5)))
        before = [sys.getrefcount(thing) for thing in objects]
        for _ in range(10_000):
            signature((BASE, None), (1, (2, 0.5)))
        after = [sys.getrefcount(thing) for thing in objects]
    assert all(abs(a - b) < 1000 for a, b in zip(after, before))
