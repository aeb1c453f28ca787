"""What every backend must do, for its author to run.

    python -m pagedflash.testing.conformance --backend cpu

or, with pytest, whatever module keeps to :class:`~pagedflash.backends.protocol.Backend`:

>>> from pagedflash.testing.conformance import BackendConformance
>>> class TestMine(BackendConformance):
...     backend = my_backend
...     device = "mydevice"
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

from .. import arguments
from ..backends import backward, reference
from ..backends.protocol import Backend, Capabilities, Support
from ..dispatch import BACKEND_MODULES, DEVICE_BACKENDS
from ..errors import InvalidValue
from ..plan_cache import signature_of
from ..problem import Append, AttentionProblem, KVCache
from ..validate_values import check_values, check_write_values, key_lengths
from .compare import (
    OUT_TOLERANCE,
    assert_gradients_match_reference,
    assert_matches_reference,
    assert_same_caches,
    copy_of,
    describe,
)
from .problems import GARBAGE, HEAD_DIMS, LAYOUTS, random_problem

APPENDING = ("cache", "paged", "paged varlen")
"""The layouts whose problems may append; new tokens of the last are packed."""

LARGEST_HEAD_DIM = 576
"""No larger ones are drawn, whatever a backend says it takes."""


class BackendConformance:
    """The checks, one method each. pytest collects them from a subclass whose name begins with ``Test``."""

    backend: Backend
    device: str = "cpu"
    problems: int = 5
    """Random problems of each kind: of a layout and a dtype, say."""
    seed: int = 0

    def test_it_says_what_it_is(self) -> None:
        """A name, its capabilities, and that it is available."""
        assert isinstance(self.backend.NAME, str) and isinstance(self.backend.CAPABILITIES, Capabilities)
        available = self.backend.available()
        assert isinstance(available, Support) and available.ok, f"not available: {available}"

    def test_supports_is_decided_by_the_signature(self) -> None:
        """``supports`` needs no values, gives the same answer each time, and a reason with every no."""
        for problem in self.draw("supports", supported=False):
            first, second = (self.backend.supports(signature_of(problem)) for _ in range(2))
            assert isinstance(first, Support) and first == second, describe(problem)
            assert first.ok or first.reason, f"no reason why it is not supported: {describe(problem)}"

    def test_it_supports_something(self) -> None:
        """Of every dtype that it says it takes."""
        for dtype in self.dtypes:
            assert any(True for _ in self.draw("something", dtype=dtype, count=50)), f"of 50 problems of {dtype}, none"

    def test_random_problems(self) -> None:
        """Output, LSE and cache over all options, in every layout and dtype, against float64; nothing else is written."""
        for layout in LAYOUTS:
            for dtype in self.dtypes:
                for problem in self.draw("random", layout=layout, dtype=dtype):
                    inputs = [tensor.clone() for tensor in _inputs(problem)]
                    assert_matches_reference(problem, self.backend.attention)
                    written = [not torch.equal(a, b) for a, b in zip(inputs, _inputs(problem))]
                    assert not any(written), f"an input was written: {describe(problem)}"

    def test_long_sequences(self) -> None:
        """Hundreds of keys and more, which are split, and up to as many queries."""
        options: dict[str, Any] = dict(max_keys=2000, max_queries=200, head_dims=(64,), groups=(1, 4))
        for layout in ("paged", "paged varlen"):
            for problem in self.draw("long", layout=layout, count=20 * self.problems, **options):
                if max(key_lengths(problem), default=0) > 400:  # few that are drawn are
                    assert_matches_reference(problem, self.backend.attention)

    def test_head_dims_at_its_limits(self) -> None:
        """The least and the largest that its capabilities name, if it supports them."""
        capabilities = self.backend.CAPABILITIES
        multiple = capabilities.head_dim_multiple
        for head_dim in {multiple, 5 * multiple, min(capabilities.max_head_dim, LARGEST_HEAD_DIM)}:
            for layout in ("dense", "varlen", "paged varlen"):
                for problem in self.draw("limits", layout=layout, head_dims=(head_dim,)):
                    assert_matches_reference(problem, self.backend.attention)

    def test_kv_write(self) -> None:
        """A write of its own: these slots and no others."""
        for layout in APPENDING:
            for problem in self.draw("write", layout=layout, appends=True):
                expected = copy_of(problem)
                reference.kv_write(expected.write)
                self.backend.kv_write(problem.write)
                assert_same_caches(problem, expected)

    def test_slot_mappings(self) -> None:
        """Packed tokens, each to a slot of its own or nowhere: ``kv_paged_write(slot_mapping=...)``."""
        for tokens, pages in self.draw_tokens("slots"):
            slots = torch.randperm(pages.k.shape[0] * pages.k.shape[1], device=self.device)[: len(tokens.k_new)]
            slots[::3] = -1
            want = [pages.k.flatten(0, 1).clone(), pages.v.flatten(0, 1).clone()]
            for cache, new in zip(want, tokens[:2]):
                cache[slots[slots >= 0]] = new[slots >= 0]
            write, _ = arguments.write(*tokens[:2], pages.k, pages.v, None, None, slots, None, None)
            self.backend.kv_write(write)
            assert torch.equal(pages.k.flatten(0, 1), want[0]) and torch.equal(pages.v.flatten(0, 1), want[1])

    def test_queries_keys_and_values_in_one_tensor(self) -> None:
        """Views of it, as ``flash_attn_qkvpacked_func`` makes them."""
        for tokens, _ in self.draw_tokens("qkvpacked", 30):
            qkv = torch.stack((tokens.k_new,) * 3, 1).view(2, 15, 3, *tokens.k_new.shape[1:])
            problem, _ = arguments.dense(*qkv.unbind(2), 0, None, True, (-1, -1), 0.0, 0.0, None, None, None)
            if self.supports(problem):
                assert_matches_reference(problem, self.backend.attention)

    def test_results_are_the_same_every_time(self) -> None:
        """Bit for bit."""
        for layout in LAYOUTS:
            for problem in self.draw("determinism", layout=layout, max_keys=600):
                self.assert_same_bits(problem, copy_of(problem))

    def test_gradients(self) -> None:
        """Of q, k, v and sinks, over all options, against autograd in float64: the backend's own ``backward``, or the common
        one from what its forward pass gives."""
        run = getattr(self.backend, "backward", backward.backward)
        for layout in ("dense", "cache", "varlen"):
            for problem in self.draw("gradients", layout=layout):
                cache = problem.cache
                if problem.append is None and cache.k_descale is None and cache.v_descale is None:
                    assert_gradients_match_reference(problem, self.backend.attention, run)

    def test_gradients_are_the_same_every_time(self) -> None:
        """Bit for bit."""
        run = getattr(self.backend, "backward", backward.backward)
        for layout in ("dense", "varlen"):
            for problem in self.draw("same gradients", layout=layout, max_keys=600):
                out, lse = self.backend.attention(problem)
                assert lse is not None, describe(problem)
                first, second = (run(problem, out, lse, torch.ones_like(out), torch.ones_like(lse)) for _ in range(2))
                assert all(torch.equal(a, b) for a, b in zip(first, second)), describe(problem)

    def test_an_output_that_is_given_is_written(self) -> None:
        """With the bits of one that is not."""
        for layout in LAYOUTS:
            for problem in self.draw("out", layout=layout):
                want, _ = self.backend.attention(copy_of(problem))
                out = torch.full_like(want, torch.nan)
                returned, _ = self.backend.attention(problem, out)
                assert returned.data_ptr() == out.data_ptr() and torch.equal(out, want), describe(problem)

    def test_the_output_is_the_same_without_the_lse(self) -> None:
        """Bit for bit, and into an output that is given."""
        for layout in LAYOUTS:
            for problem in self.draw("without lse", layout=layout):
                want, _ = self.backend.attention(copy_of(problem))
                for out in (None, torch.full_like(want, torch.nan)):
                    returned, _ = self.backend.attention(copy_of(problem), out, with_lse=False)
                    assert torch.equal(returned, want), describe(problem)
                    assert out is None or returned.data_ptr() == out.data_ptr(), describe(problem)

    def test_slots_that_no_sequence_owns_are_not_read(self) -> None:
        """They hold NaN, then numbers: the results have the same bits."""
        for layout in APPENDING:
            for problem in self.draw("poison", layout=layout):
                other = copy_of(problem)
                for cache in other.cache[:4]:
                    if cache is not None:
                        cache.copy_(torch.where((cache == -128) | cache.isnan(), 3, cache.float()))
                self.assert_same_bits(problem, other)

    def test_an_empty_batch(self) -> None:
        for layout in LAYOUTS:
            for problem in self.draw("empty", layout=layout, count=40):
                if problem.batch_size == 0:
                    assert_matches_reference(problem, self.backend.attention)
                    if problem.append is not None:
                        self.backend.kv_write(problem.write)

    def test_sequences_without_keys(self) -> None:
        """Lengths of 0, before an append if there is one, and -1: a sequence to skip."""
        for layout in APPENDING:
            for problem in self.draw("no keys", layout=layout):
                if problem.cache.seqused_k is None:
                    continue
                for length in (0, -1):
                    lengths = torch.full_like(problem.cache.seqused_k, length)
                    changed = copy_of(problem).replace(seqused_k=lengths, cache_leftpad=None)
                    if _has_right_values(changed):
                        assert_matches_reference(changed, self.backend.attention)

    def test_values_are_read_at_each_call(self) -> None:
        """Two problems of one signature, the sequences in another order: nothing of the first is used for the second."""
        for layout in APPENDING:
            for problem in self.draw("values", layout=layout):
                cache = problem.cache
                if cache.cu_seqlens_k is not None or (cache.block_table is None and cache.cache_batch_idx is None):
                    continue
                order = ("block_table", "cache_batch_idx", "cache_leftpad", "seqused_k")
                flipped = {name: getattr(cache, name).flip(0) for name in order if getattr(cache, name) is not None}
                other = copy_of(problem).replace(**flipped)
                if _has_right_values(other):
                    self.backend.attention(problem)
                    assert_matches_reference(other, self.backend.attention)

    def test_wrong_values_are_rejected_before_anything_is_written(self) -> None:
        """Where the backend says that it checks them: one wrong length, offset, row or table entry at a time."""
        if not self.backend.CAPABILITIES.checks_values:
            return
        for layout in LAYOUTS:
            for problem in self.draw("wrong values", layout=layout):
                for wrong in self.with_one_value_changed(problem):
                    self.assert_rejected(wrong, wrong, check_values, self.backend.attention)
                    if wrong.append is not None:
                        self.assert_rejected(wrong, wrong.write, check_write_values, self.backend.kv_write)

    # ----------------------------------------------------------------------------------------------------------------

    @property
    def dtypes(self) -> list[torch.dtype]:
        return [dtype for dtype in self.backend.CAPABILITIES.dtypes if dtype in OUT_TOLERANCE]

    def draw(
        self, purpose: str, *, count: int | None = None, supported: bool = True, appends: bool = False, **options: Any
    ) -> Iterator[AttentionProblem]:
        """Random problems within the backend's capabilities: of those that are drawn, the ones it supports, and that append
        if so asked."""
        capabilities = self.backend.CAPABILITIES
        for i in range(count or self.problems):
            rng = random.Random(f"{self.seed} {purpose} {options} {i}")
            dtype = options.get("dtype") or rng.choice(self.dtypes)
            problem = random_problem(rng, device=self.device, capabilities=capabilities, **{**options, "dtype": dtype})
            if (not appends or problem.append is not None) and (not supported or self.supports(problem)):
                yield problem

    def draw_tokens(self, purpose: str, tokens: int = 20) -> Iterator[tuple[Append, KVCache]]:
        """Packed new tokens of each dtype, and pages of 4 for them."""
        head_dim = next(d for d in HEAD_DIMS if self.takes_head_dim(d))
        for dtype in self.dtypes:
            generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {purpose}").getrandbits(32))
            new = torch.randn(2, tokens, 2, head_dim, generator=generator).to(self.device, dtype)
            pages = torch.randn(2, 16, 4, 2, head_dim, generator=generator).to(self.device, dtype)
            yield Append(*new), KVCache(*pages)

    def takes_head_dim(self, head_dim: int) -> bool:
        capabilities = self.backend.CAPABILITIES
        return head_dim <= capabilities.max_head_dim and head_dim % capabilities.head_dim_multiple == 0

    def supports(self, problem: AttentionProblem) -> bool:
        return self.backend.supports(signature_of(problem)).ok

    def assert_same_bits(self, one: AttentionProblem, other: AttentionProblem) -> None:
        for name, a, b in zip(("out", "lse"), self.backend.attention(one), self.backend.attention(other)):
            assert a is not None and b is not None and torch.equal(a, b), f"{name} has other bits: {describe(one)}"

    def with_one_value_changed(self, problem: AttentionProblem) -> Iterator[AttentionProblem]:
        """In each tensor of lengths or indices, to values of all kinds; some of the problems are still right."""
        rng = random.Random(f"{self.seed} {describe(problem)}")
        for name, tensor in problem.named_fields().items():
            if isinstance(tensor, Tensor) and tensor.dtype == torch.int32 and tensor.numel():
                for value in (*GARBAGE, -2, 0, 1, 2**31 - 1):
                    changed = tensor.clone()
                    changed.view(-1)[rng.randrange(tensor.numel())] = value
                    yield copy_of(problem).replace(**{name: changed})
        if problem.queries.max_seqlen_q:
            yield copy_of(problem).replace(max_seqlen_q=problem.queries.max_seqlen_q - 1)

    @staticmethod
    def assert_rejected(
        wrong: AttentionProblem, part: Any, check: Callable[[Any], None], run: Callable[[Any], object]
    ) -> None:
        """``run(part)`` raises if ``check(part)`` does, and the cache of ``wrong`` stays as it was."""
        try:
            check(part)
        except InvalidValue:
            before = copy_of(wrong)
            try:
                run(part)
            except InvalidValue:
                assert_same_caches(wrong, before)
            else:
                raise AssertionError(f"wrong values were not rejected: {describe(wrong)}") from None


def _inputs(problem: AttentionProblem) -> list[Tensor]:
    """All tensors but the cache and the scales that an append may write."""
    fields, cache = problem.named_fields(), KVCache._fields[:4]
    return [value for name, value in fields.items() if name not in cache and isinstance(value, Tensor)]


def _has_right_values(problem: AttentionProblem) -> bool:
    try:
        check_values(problem)
    except InvalidValue:
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pagedflash.testing.conformance", description="Check a backend.")
    parser.add_argument("--backend", required=True, help=f"{', '.join(BACKEND_MODULES)}, or a module that can be imported")
    parser.add_argument("--device", help="of the tensors, such as cuda:1 (default: the device the backend is written for)")
    parser.add_argument("--problems", type=int, default=20, metavar="N", help="random problems of each kind (default: 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another one draws other problems (default: 0)")
    options = parser.parse_args(arguments)

    suite = BackendConformance()
    suite.backend = load(options.backend)
    suite.device = options.device or _device_of(options.backend)
    suite.problems, suite.seed = options.problems, options.seed
    available = suite.backend.available()
    if not available.ok:
        print(f"{options.backend} is not available here: {available.reason}", file=sys.stderr)
        return 2
    failed = sum(not _run(suite, name) for name in vars(BackendConformance) if name.startswith("test_"))
    print(f"{options.backend} on {suite.device}, seed {suite.seed}: " + (f"{failed} FAILED" if failed else "all passed"))
    return 1 if failed else 0


def _run(suite: BackendConformance, name: str) -> bool:
    print(f"{name.removeprefix('test_').replace('_', ' '):62}", end="", flush=True)
    start = time.perf_counter()
    try:
        getattr(suite, name)()
    except Exception as error:  # whatever a backend raises, the other checks go on
        print("FAILED", flush=True)
        print(f"    {error}" if isinstance(error, AssertionError) else traceback.format_exc())
        return False
    print(f"passed, {time.perf_counter() - start:.1f} s", flush=True)
    return True


def load(name: str) -> Backend:
    """A backend by its name here, or by the name of its module."""
    module = BACKEND_MODULES.get(name, name)
    return cast(Backend, import_module(module, "pagedflash"))


def _device_of(backend: str) -> str:
    """The first device type it is written for; the CPU for any other."""
    return next((device for device, name in DEVICE_BACKENDS.items() if name == backend), "cpu")


if __name__ == "__main__":
    sys.exit(main())
