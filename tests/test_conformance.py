"""Every backend that can run here passes the conformance suite, and the suite fails for backends that are wrong."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pagedflash import availability
from pagedflash.backends import backward, reference
from pagedflash.backends.protocol import Capabilities, Support
from pagedflash.problem import AttentionProblem, CacheWrite
from pagedflash.testing import conformance
from pagedflash.testing.conformance import BackendConformance
from pagedflash.validate_values import check_values, check_write_values

if importlib.util.find_spec("triton"):
    import triton_interpreter  # noqa: F401


class _AsInTheseTests(BackendConformance):
    """The run's seed and size; skipped where the backend cannot run."""

    name: str
    devices: tuple[str, ...] = ("cpu",)
    usual = 2

    @pytest.fixture(autouse=True)
    def backend_ready(self, request: pytest.FixtureRequest, device: str, rounds: Callable[[int], int]) -> Iterator[None]:
        if device not in self.devices:
            pytest.skip(f"not for tensors on {device}")
        with self.prepared(device):
            support = availability()[self.name]
            if not support.ok:
                pytest.skip(support.reason)
            self.backend, self.device = conformance.load(self.name), device
            self.problems = rounds(self.usual)
            self.seed = request.getfixturevalue("rng").getrandbits(32)
            yield

    def prepared(self, device: str) -> Any:
        return nullcontext()


class TestReference(_AsInTheseTests):
    name = "reference"
    devices = ("cpu", "cuda", "mps")


class TestCpu(_AsInTheseTests):
    name = "cpu"


class TestTriton(_AsInTheseTests):
    name = "triton"
    devices = ("cpu", "cuda")  # cpu: through Triton's interpreter
    usual = 1


class TestMetal(_AsInTheseTests):
    name = "metal"
    devices = ("cpu", "mps")  # cpu: through metalsim
    usual = 1

    def prepared(self, device: str) -> Any:
        pytest.importorskip("metalsim")
        from metal_harness import kernels_on

        return kernels_on(device)


# --------------------------------------------------------------------------------------------------------------------
# Wrong backends
# --------------------------------------------------------------------------------------------------------------------


def backend(**changes: Any) -> ModuleType:
    """The reference, with something changed."""
    known = {name: getattr(reference, name) for name in ("NAME", "available", "supports", "attention", "kv_write")}
    return SimpleNamespace(**(known | {"CAPABILITIES": Capabilities()} | changes))


def reads_what_it_does_not_own(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    out, lse = reference.attention(problem)
    return out + problem.cache.k.isnan().sum(), lse


calls: list[AttentionProblem] = []


def gives_other_bits_each_time(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    calls.append(problem)
    out, lse = reference.attention(problem)
    return out + 1e-6 * (len(calls) % 2), lse


def forgets_the_window(problem: AttentionProblem, *results: Tensor) -> backward.Gradients:
    return backward.backward(problem.replace(window_left=-1, window_right=-1), *results)


def adds_in_any_order(problem: AttentionProblem, *results: Tensor) -> backward.Gradients:
    calls.append(problem)
    gradients = backward.backward(problem, *results)
    return gradients._replace(q=gradients.q + 1e-3 * (len(calls) % 2))


def keeps_the_first_lengths(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    lengths = problem.cache.seqused_k
    kept = problem.plan("broken", lambda signature: []) if lengths is not None else []
    kept.append(lengths)
    return reference.attention(problem.replace(seqused_k=kept[0]))


def normalises_with_the_lse(problem: AttentionProblem, out: Tensor | None = None, with_lse: bool = True) -> Any:
    results = reference.attention(problem, out)
    return results if with_lse else (results[0].mul_(2), None)


def writes_its_queries(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    results = reference.attention(problem)
    problem.queries.q.zero_()
    return results


def writes_one_slot_more(write: CacheWrite) -> None:
    reference.kv_write(write)
    write.cache.v[-1:] = 0


def refuses_an_empty_batch(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    if not problem.batch_size:
        raise RuntimeError("grid of size 0")
    return reference.attention(problem)


def attends_skipped_sequences(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    out, lse = reference.attention(problem)
    lengths = problem.cache.seqused_k
    return (out, lse) if lengths is None or not (lengths < 0).any() else (out + 1, lse)


def forgets_what_is_far_away(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    return reference.attention(problem if problem.capacity < 400 else problem.replace(window_left=300))


def writes_before_it_checks(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    problem.cache.k.zero_()
    check_values(problem)
    return reference.attention(problem)


def checks_first(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    check_values(problem)
    return reference.attention(problem)


def reads_values(problem: AttentionProblem) -> Support:
    return Support(problem.queries.q.sum().item() > 0)


CHECKING = Capabilities(checks_values=True)


@pytest.mark.parametrize(
    "test, wrong",
    [
        ("it_says_what_it_is", backend(available=lambda: (True, ""))),
        ("it_says_what_it_is", backend(available=lambda: Support(False, "no device"))),
        ("supports_is_decided_by_the_signature", backend(supports=reads_values)),
        ("supports_is_decided_by_the_signature", backend(supports=lambda problem: Support(False))),
        ("it_supports_something", backend(supports=lambda p: Support(p.queries.q.dtype == torch.float32, "not float32"))),
        ("random_problems", backend(attention=writes_its_queries)),
        ("random_problems", backend(attention=lambda problem: reference.attention(problem.replace(softcap=0.0)))),
        ("long_sequences", backend(attention=forgets_what_is_far_away)),
        ("head_dims_at_its_limits", backend(attention=lambda p: reference.attention(p)[:1] * 2)),
        ("kv_write", backend(kv_write=writes_one_slot_more)),
        ("slot_mappings", backend(kv_write=writes_one_slot_more)),
        ("queries_keys_and_values_in_one_tensor", backend(attention=lambda p: reference.attention(p.replace(scale=1.0)))),
        ("results_are_the_same_every_time", backend(attention=gives_other_bits_each_time)),
        ("gradients", backend(backward=forgets_the_window)),
        ("gradients_are_the_same_every_time", backend(backward=adds_in_any_order)),
        ("an_output_that_is_given_is_written", backend(attention=lambda problem, out=None: reference.attention(problem))),
        ("the_output_is_the_same_without_the_lse", backend(attention=normalises_with_the_lse)),
        ("slots_that_no_sequence_owns_are_not_read", backend(attention=reads_what_it_does_not_own)),
        ("an_empty_batch", backend(attention=refuses_an_empty_batch)),
        ("sequences_without_keys", backend(attention=attends_skipped_sequences)),
        ("values_are_read_at_each_call", backend(attention=keeps_the_first_lengths)),
        ("wrong_values_are_rejected_before_anything_is_written", backend(CAPABILITIES=CHECKING)),
        (
            "wrong_values_are_rejected_before_anything_is_written",
            backend(CAPABILITIES=CHECKING, attention=writes_before_it_checks),
        ),
        ("wrong_values_are_rejected_before_anything_is_written", backend(CAPABILITIES=CHECKING, attention=checks_first)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_backend_fails(test: str, wrong: Any) -> None:
    suite = BackendConformance()
    suite.backend, suite.problems = wrong, 6
    with pytest.raises((AssertionError, AttributeError, IndexError, RuntimeError)):
        getattr(suite, f"test_{test}")()


def test_every_check_has_a_wrong_backend() -> None:
    (mark,) = test_a_wrong_backend_fails.pytestmark
    assert {f"test_{test}" for test, _ in mark.args[1]} == {n for n in vars(BackendConformance) if n.startswith("test_")}


def test_a_backend_that_checks_values_passes() -> None:
    def write(cache_write: CacheWrite) -> None:
        check_write_values(cache_write)
        reference.kv_write(cache_write)

    suite = BackendConformance()
    suite.backend = backend(CAPABILITIES=CHECKING, attention=checks_first, kv_write=write)
    suite.problems = 1
    suite.test_wrong_values_are_rejected_before_anything_is_written()


# --------------------------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------------------------


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance.main(["--backend", "pagedflash.backends.reference", "--problems", "1", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "random problems" in printed and "reference on cpu, seed 3: all passed" in printed


def test_command_says_what_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(reference, "attention", refuses_an_empty_batch_of(reference.attention))
    assert conformance.main(["--backend", "reference", "--problems", "1"]) == 1
    printed = capsys.readouterr().out
    assert "RuntimeError: grid of size 0" in printed and "FAILED" in printed


def refuses_an_empty_batch_of(attention: Any) -> Any:
    def refusing(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
        if not problem.batch_size and not problem.queries.q.dtype == torch.float64:
            raise RuntimeError("grid of size 0")
        return attention(problem)

    return refusing


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is one")
def test_command_without_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance.main(["--backend", "metal"]) == 2
    assert "metal is not available here: " in capsys.readouterr().err
