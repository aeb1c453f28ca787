"""Which backend runs a call, and that falling back is never silent."""

from __future__ import annotations

import sys
import threading
import warnings
from types import ModuleType

import pytest
import torch

import pagedflash
from pagedflash import CallKind, count_calls, dispatch, flash_attn_func, flash_attn_with_kvcache, kv_paged_write, use_backend
from pagedflash.backends.protocol import Capabilities, Support

Q, K, V = torch.randn(1, 3, 4, 32), torch.randn(1, 5, 2, 32), torch.randn(1, 5, 2, 32)


@pytest.fixture
def picky(monkeypatch):
    """A backend that is there, and supports nothing with a softcap."""
    module = ModuleType("picky_backend")
    vars(module).update(
        NAME="picky",
        CAPABILITIES=Capabilities(),
        available=lambda: Support(True),
        supports=lambda problem: Support(problem.scores.softcap == 0, "softcap is not supported"),
        attention=lambda problem, out, with_lse: (torch.full(problem.out_shape, 7.0), torch.zeros(problem.lse_shape)),
        kv_write=lambda write: None,
    )
    monkeypatch.setitem(sys.modules, "picky_backend", module)
    monkeypatch.setitem(dispatch.BACKEND_MODULES, "picky", "picky_backend")
    yield module
    dispatch._import.cache_clear()
    dispatch._warn_once.cache_clear()


def test_a_forced_backend_runs_what_it_supports(picky):
    with use_backend("picky"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (flash_attn_func(Q, K, V) == 7).all()


def test_an_unsupported_call_runs_on_the_reference_and_warns_once(picky):
    with use_backend("reference"):
        want = flash_attn_func(Q, K, V, softcap=2.0)
    with use_backend("picky"):
        with pytest.warns(RuntimeWarning, match="reference runs instead of picky: softcap is not supported"):
            assert torch.equal(flash_attn_func(Q, K, V, softcap=2.0), want)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            flash_attn_func(Q, K, V, softcap=2.0)


def test_an_unavailable_backend_says_why(picky):
    picky.available = lambda: Support(False, "its library is missing")
    with use_backend("picky"), pytest.warns(RuntimeWarning, match="its library is missing"):
        flash_attn_func(Q, K, V)
    assert pagedflash.availability()["picky"] == (False, "its library is missing")
    assert pagedflash.availability()["reference"] == (True, "")


def test_a_backend_that_cannot_be_imported_says_why(monkeypatch):
    monkeypatch.setitem(dispatch.BACKEND_MODULES, "absent", "no_such_module_anywhere")
    with use_backend("absent"), pytest.warns(RuntimeWarning, match="no_such_module_anywhere"):
        flash_attn_func(Q, K, V)
    dispatch._import.cache_clear()


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match="backend is 'fpga', expected one of"), use_backend("fpga"):
        pass


def test_calls_are_counted_by_kind_in_all_threads():
    pages = torch.randn(2, 4, 4, 2, 32)
    table, lengths = torch.tensor([[1, 2]]), torch.tensor([3])
    with use_backend("reference"), count_calls() as calls:
        flash_attn_func(Q, K, V)
        thread = threading.Thread(
            target=lambda: flash_attn_with_kvcache(Q, pages[0], pages[1], cache_seqlens=lengths, block_table=table)
        )
        thread.start()
        thread.join()
        kv_paged_write(K[:, :1], V[:, :1], pages[0], pages[1], table, lengths)
    flash_attn_func(Q, K, V)
    assert calls == {
        CallKind("dense", "reference", "cpu"): 1,
        CallKind("paged", "reference", "cpu"): 1,
        CallKind("write", "reference", "cpu"): 1,
    }


def test_other_devices_check_values_when_asked_to(monkeypatch):
    class Elsewhere:
        is_cpu = False

    assert dispatch.values_wanted(Q) and not dispatch.values_wanted(Elsewhere)
    monkeypatch.setenv(dispatch.CHECK_VARIABLE, "1")
    assert dispatch.values_wanted(Elsewhere)


def runs_on() -> str:
    return dispatch.backend_for(Q).NAME


def test_nested_backends_restore_the_one_before(picky):
    with use_backend("picky"):
        with use_backend("reference"):
            with use_backend("picky"):
                assert runs_on() == "picky"
            assert runs_on() == "reference"
        assert runs_on() == "picky"
    assert runs_on() == "cpu"


def test_threads_follow_the_block_they_run_in_unless_they_have_their_own(picky):
    """A thread started inside a block, as an engine does, runs there too; threads with blocks of their own never meet."""
    entered, left = threading.Barrier(2, timeout=60), threading.Barrier(2, timeout=60)
    seen: dict[str, list[str]] = {"reference": [], "picky": []}

    def work(name: str) -> None:
        with use_backend(name):
            entered.wait()
            seen[name].append(runs_on())
            left.wait()

    with use_backend("reference"):
        inherits = threading.Thread(target=lambda: seen["reference"].append(runs_on()))
        inherits.start()
        inherits.join()
    assert seen["reference"] == ["reference"]

    threads = [threading.Thread(target=work, args=(name,)) for name in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"reference": ["reference", "reference"], "picky": ["picky"]}
    assert runs_on() == "cpu"


def test_a_call_found_by_its_signature_keeps_its_own_hint(picky, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are shared by calls whose longest sequence is promised to be about as long; the problems are not."""
    seen = []
    monkeypatch.setattr(picky, "attention", lambda problem, *_: (seen.append(problem), torch.zeros(problem.lse_shape)))
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    with use_backend("picky"):
        for hint in (5, 5, 7, 9):
            pagedflash.flash_attn_varlen_func(Q[0], Q[0, :, :2], Q[0, :, :2], offsets, offsets, 3, hint)
    assert [problem.cache.max_seqlen_k for problem in seen] == [5, 5, 7, 9]
    assert seen[0].entry is seen[2].entry is not seen[3].entry
