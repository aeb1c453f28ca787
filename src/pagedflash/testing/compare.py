"""The comparison with float64 that every backend must pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends import reference
from ..backends.backward import Gradients
from ..problem import AttentionProblem, KVCache

# Largest difference to float64 on values of about unit size. float16 and bfloat16 round the output (2^-11, 2^-8 of its
# size) and, with rotary, the rotated queries and keys, which moves scores and with them the LSE.
OUT_TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LSE_TOLERANCE = {torch.float32: 5e-5, torch.float16: 5e-5, torch.bfloat16: 5e-5}
ROTARY_LSE_TOLERANCE = {torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}

# Of the largest element of a gradient, which is a sum over queries or keys.
GRADIENT_TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

Run = Callable[[AttentionProblem], tuple[Tensor, Tensor | None]]
RunBackward = Callable[[AttentionProblem, Tensor, Tensor, Tensor, Tensor], Gradients]


def assert_matches_reference(problem: AttentionProblem, run: Run) -> None:
    """``run`` must give the reference's output and LSE in float64, leave finite numbers everywhere, and write its slots and
    no others."""
    message, dtype = describe(problem), problem.queries.q.dtype
    wanted = reference.attention(as_float64(problem)) if problem.cache.k.dtype == problem.cache.v.dtype == dtype else None
    expected = copy_of(problem)
    rotary = False
    if expected.append is not None:
        reference.kv_write(expected.write)
        rotary = expected.append.rotary_cos is not None

    out, lse = run(problem)

    # A cache of another format rounds what is appended: its output is that of what was written, which is compared too.
    want_out, want_lse = wanted or reference.attend(as_float64(problem))
    assert out.dtype == dtype and out.shape == problem.out_shape, message
    assert lse is not None and lse.dtype == torch.float32 and lse.shape == problem.lse_shape, message
    _assert_close("out", out, want_out, OUT_TOLERANCE[dtype], message)
    _assert_close("lse", lse, want_lse, (ROTARY_LSE_TOLERANCE if rotary else LSE_TOLERANCE)[dtype], message)
    assert_same_caches(problem, expected)


def assert_gradients_match_reference(problem: AttentionProblem, run: Run, run_backward: RunBackward) -> None:
    """The gradients of random weights on output and LSE must be those of autograd through the reference in float64. Only for
    problems without an append, a block table and scales of quantized keys."""
    oracle = as_float64(problem)
    q, sinks = oracle.queries.q, oracle.scores.sinks
    wanted = [tensor for tensor in (q, *oracle.cache[:2], sinks) if tensor is not None]
    for tensor in wanted:
        tensor.requires_grad_()
    results = reference.attention(oracle)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(result.shape, generator=generator, dtype=torch.float64) for result in results]
    weights = [weight.to(problem.queries.q.dtype).double() for weight in weights]
    # An LSE without keys is infinite whatever the inputs are.
    terms = [(result.masked_fill(result.isinf(), 0.0) * weight).sum() for result, weight in zip(results, weights)]
    total = sum(terms, 0.0 * q.sum())  # differentiable without sequences, too
    want = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)

    out, lse = run(problem)
    assert lse is not None, describe(problem)
    d_out, d_lse = (weight.to(result) for result, weight in zip((out, lse), weights))
    got = run_backward(problem, out, lse, d_out, d_lse)

    message = describe(problem)
    assert got.sinks.shape == ((0,) if sinks is None else sinks.shape), message
    for name, given, gradient, expected in zip(
        Gradients._fields, (problem.queries.q, *problem.cache[:2], problem.scores.sinks), got, want
    ):
        assert given is not None and gradient.dtype == given.dtype and gradient.shape == given.shape, message
        assert gradient.isfinite().all(), f"the gradient of {name} is not finite: {message}"
        if gradient.numel():
            error, largest = (gradient.cpu().double() - expected).abs().max(), expected.abs().max()
            tolerance = max(GRADIENT_TOLERANCE[dtype] for dtype in (problem.queries.q.dtype, given.dtype))
            allowed = tolerance * largest.clamp(min=1.0)
            assert error <= allowed, f"the gradient of {name} is off by up to {error:.3g} of {largest:.3g}: {message}"


def assert_same_caches(problem: AttentionProblem, expected: AttentionProblem) -> None:
    """All memory that the caches lie in must be the same bit for bit, except that rotated keys may round differently."""
    rotary = expected.append is not None and expected.append.rotary_cos is not None
    for name, cache, want in zip(KVCache._fields, problem.cache[:4], expected.cache[:4]):
        if cache is None or want is None:
            continue
        rtol, atol = _rounding_step(cache.dtype, expected.queries.q.dtype) if rotary else (0.0, 0.0)
        torch.testing.assert_close(
            _whole_storage(cache),
            _whole_storage(want),
            rtol=rtol,
            atol=atol,
            equal_nan=True,
            msg=f"{name}: {describe(expected)}",
        )


def _rounding_step(dtype: torch.dtype, new_dtype: torch.dtype) -> tuple[float, float]:
    """``(rtol, atol)`` of two elements of a cache that were rounded from neighbours of ``new_dtype``."""
    if dtype == torch.int8:
        return 0.0, 1.0
    step = max(torch.finfo(dtype).eps, torch.finfo(new_dtype).eps)
    return 2 * step, step


def describe(problem: AttentionProblem) -> str:
    """A problem in one line, for messages."""
    words = [problem.layout, str(problem.queries.q.dtype)]
    for field, value in problem.named_fields().items():
        if isinstance(value, Tensor):
            words.append(f"{field}{list(value.shape)}")
        elif value not in (None, False):
            words.append(f"{field}={value}")
    return " ".join(words)


def copy_of(problem: AttentionProblem) -> AttentionProblem:
    """A copy whose tensors overlap in memory exactly as the original's do."""
    storages: dict[int, torch.UntypedStorage] = {}

    def clone(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        copy = storages.setdefault(storage._cdata, storage.clone())
        return tensor.new_empty(0).set_(copy, tensor.storage_offset(), tensor.shape, tensor.stride())

    return problem.map_tensors(clone)


def as_float64(problem: AttentionProblem) -> AttentionProblem:
    """The same problem on float64 copies of its tensors, on the CPU: an oracle for a device must not run on that device. A
    cache of another format than the queries keeps it."""
    converted = (problem.queries.q.dtype, torch.float32)
    return problem.map_tensors(lambda tensor: tensor.cpu().double() if tensor.dtype in converted else tensor.cpu())


def _assert_close(name: str, got: Tensor, want: Tensor, tolerance: float, message: str) -> None:
    assert not got.isnan().any(), f"{name} has NaN: {message}"
    got = got.cpu().double()
    assert torch.equal(got.isinf(), want.isinf()), f"{name} is infinite at other places: {message}"
    error = (got - want).masked_fill(want.isinf(), 0.0).abs()
    allowed = tolerance * want.masked_fill(want.isinf(), 0.0).abs().clamp(min=1.0)
    if error.numel():
        assert (error <= allowed).all(), f"{name} is off by up to {error.max():.3g}: {message}"


def _whole_storage(tensor: Tensor) -> Tensor:
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((count,), (1,), 0).cpu().float()
