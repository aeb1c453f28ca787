"""Dropout: which probabilities are dropped, how many, what becomes of the others, and that nothing but the seed decides.

That every backend drops the same, forward and backward, is checked by the conformance suite: its random problems have it.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

import pagedflash
from pagedflash import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from pagedflash.backends import backward, cpu, dropout
from pagedflash.backends.protocol import Capabilities
from pagedflash.problem import Scores

if importlib.util.find_spec("triton"):
    import triton_interpreter  # noqa: F401

BACKENDS = ("reference", "cpu", "triton", "metal")


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest, device: str) -> Any:
    on_gpu = (device, request.param) in (("cuda", "triton"), ("mps", "metal"))
    where = device if on_gpu else "cpu"
    with ExitStack() as stack:
        if request.param == "metal":
            pytest.importorskip("metalsim")
            from metal_harness import kernels_on

            stack.enter_context(kernels_on(where))
        if not pagedflash.availability()[request.param].ok:
            pytest.skip(pagedflash.availability()[request.param].reason)
        stack.enter_context(torch.device(where))
        stack.enter_context(pagedflash.use_backend(request.param))
        yield request.param


def which_are_kept(length: int = 64, heads: int = 4, batch: int = 2, **options: Any) -> Tensor:
    """Probabilities, dropped and scaled, times how many there would be: values that are rows of the identity show them."""
    q, k = torch.zeros(batch, length, heads, 8), torch.zeros(batch, length, heads, 8)
    v = torch.eye(length).view(1, length, 1, length).expand(batch, -1, heads, -1).contiguous()
    q, k = (torch.nn.functional.pad(x, (0, length - 8)) for x in (q, k))
    out = flash_attn_func(q, k, v, **options)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2) * length  # (B, H, queries, keys)


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: str) -> None:
    """Those of Random123, the authors' library."""
    seed = int.from_bytes((key[0] | key[1] << 32).to_bytes(8, "little"), "little", signed=True)
    got = dropout.philox(torch.tensor(seed), tuple(torch.tensor(word) for word in counter))
    assert " ".join(f"{int(word):08x}" for word in got) == words


@pytest.mark.parametrize("queries, num_splits", [(1, 4), (3, 1), (3, 4), (70, 1)])
def test_which_are_dropped(queries: int, num_splits: int) -> None:
    """To the bit those of the definition: forward, and in the gradient of values, which shows them transposed."""
    batch, heads, keys = 2, 2, 72
    q, k = torch.zeros(batch, queries, heads, 16), torch.zeros(batch, keys, heads, 16)
    v = torch.eye(keys).view(1, keys, 1, keys).repeat(batch, 1, heads, 1).requires_grad_()
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64)
    b, h, i, j = (
        torch.arange(size).view([-1 if axis == at else 1 for at in range(4)])
        for axis, size in enumerate((batch, heads, queries, keys))
    )
    want = dropout.kept(Scores(dropout_seed=seed, dropout_p=0.3), b, h, i, j, torch.float32)

    torch.manual_seed(5)
    out = flash_attn_func(q, k, v, 0.3, num_splits=num_splits)
    assert isinstance(out, Tensor)
    torch.testing.assert_close(out.transpose(1, 2) * keys, want)
    weights = torch.eye(queries, keys).view(1, queries, 1, keys).expand_as(out)
    (d_v,) = torch.autograd.grad(out, v, weights)
    torch.testing.assert_close(d_v[..., :queries].permute(0, 2, 3, 1) * keys, want)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_so_many_are_dropped_and_the_others_scaled(p: float) -> None:
    torch.manual_seed(0)
    kept = which_are_kept(dropout_p=p)
    assert torch.allclose(kept[kept != 0], torch.tensor(1 / (1 - p)))
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs((kept == 0).double().mean() - p) < 5 * deviation


def test_no_two_rows_heads_sequences_or_calls_are_alike() -> None:
    torch.manual_seed(0)
    kept = torch.stack([which_are_kept(dropout_p=0.5) != 0 for _ in range(2)]).double()
    rows = kept.flatten(0, 3)
    agreement = (2 * rows - 1) @ (2 * rows - 1).T / rows.shape[1]  # 1 where two rows are the same, about 0 where independent
    agreement.fill_diagonal_(0)
    assert agreement.abs().max() < 0.8
    columns = 2 * kept.flatten(0, 3) - 1
    for distance in (1, 2, 3, 4, 8):  # neighbouring keys
        assert (columns[:, distance:] * columns[:, :-distance]).mean().abs() < 0.02


def test_a_seed_repeats_a_call() -> None:
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append((which_are_kept(24, dropout_p=0.5), which_are_kept(24, dropout_p=0.5)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[0][1]) and not torch.equal(results[0][0], results[2][0])


def test_without_dropout_no_number_is_drawn() -> None:
    rng_state = (torch.cuda if torch.get_default_device().type == "cuda" else torch).get_rng_state
    state = rng_state()
    which_are_kept(dropout_p=0.0)
    assert torch.equal(rng_state(), state)
    which_are_kept(dropout_p=0.1)
    assert not torch.equal(rng_state(), state)


def test_packed_and_dense_sequences_drop_the_same() -> None:
    """What is dropped depends on positions in a sequence, not on where it lies."""
    q, k, v = torch.randn(3, 2, 20, 2, 16)
    offsets = torch.tensor([0, 20, 40], dtype=torch.int32)
    torch.manual_seed(0)
    dense = flash_attn_func(q, k, v, 0.3, causal=True)
    torch.manual_seed(0)
    packed = flash_attn_varlen_func(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), offsets, offsets, 20, 20, 0.3, causal=True
    )
    torch.manual_seed(0)
    cached = flash_attn_with_kvcache(q, k, v, causal=True, dropout_p=0.3)
    torch.testing.assert_close(packed.view_as(dense), dense)
    torch.testing.assert_close(cached, dense)


def test_the_lse_is_that_of_all_keys() -> None:
    q, k, v = torch.randn(3, 1, 20, 2, 16)
    _, lse = flash_attn_func(q, k, v, 0.5, return_softmax_lse=True)
    _, want = flash_attn_func(q, k, v, return_softmax_lse=True)
    assert torch.equal(lse, want)


def test_gradients_with_dropout(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences, in float64, in blocks of two queries and two keys; natively, against those."""
    monkeypatch.setattr(backward, "_block_size", lambda heads: 2)
    offsets = torch.tensor([0, 3, 7], dtype=torch.int32)
    tensors = tuple(torch.randn(7, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def attend(*tensors: Tensor) -> Any:
        torch.manual_seed(0)
        return flash_attn_varlen_func(*tensors, offsets, offsets, 4, 4, 0.4, causal=True)

    with pagedflash.use_backend("reference"):
        if backend == "reference":
            torch.autograd.gradcheck(attend, tensors)
        want = torch.autograd.grad(attend(*tensors).square().sum(), tensors)
    if backend != "reference":
        floats = tuple(tensor.detach().float().requires_grad_() for tensor in tensors)
        got = torch.autograd.grad(attend(*floats).square().sum(), floats)
        for one, other in zip(got, want):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_activation_checkpointing_drops_the_same_again() -> None:
    q, k, v = (torch.randn(1, 20, 2, 16, requires_grad=True) for _ in range(3))
    gradients = []
    for run in (lambda f, *x: f(*x), lambda f, *x: torch.utils.checkpoint.checkpoint(f, *x, use_reentrant=False)):
        torch.manual_seed(0)
        out = run(lambda q, k, v: flash_attn_func(q, k, v, 0.5), q, k, v)
        gradients.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_a_compiled_step_draws_anew_each_time() -> None:
    """The seed is a tensor of the graph, not a constant in it."""
    q, k, v = (torch.randn(1, 20, 2, 16, requires_grad=True) for _ in range(3))
    step = torch.compile(lambda q, k, v: flash_attn_func(q, k, v, 0.5), fullgraph=True, backend="aot_eager")
    first, second = (step(q, k, v) for _ in range(2))
    assert not torch.equal(first, second)
    first.sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()
    torch.compiler.reset()


def test_a_backend_without_dropout_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CAPABILITIES", cpu.CAPABILITIES._replace(dropout=False))
    with (
        torch.device("cpu"),
        pagedflash.use_backend("cpu"),
        pytest.raises(ValueError, match=r"dropout_p is 0.125, expected 0: on cpu there is no"),
    ):
        which_are_kept(length=128, dropout_p=0.125)
    assert not Capabilities().dropout


def test_what_was_dropped_is_not_returned() -> None:
    with pytest.raises(ValueError, match=r"return_attn_probs is True with a dropout_p of 0\.5, expected False"):
        which_are_kept(dropout_p=0.5, return_attn_probs=True)


FIRST_CALL = """
import torch
from pagedflash import flash_attn_func

torch.manual_seed(0)
q, k = torch.randn(1, 64, 16, 64).bfloat16(), torch.randn(1, 64, 1, 64).bfloat16()
assert flash_attn_func(q, k, k, dropout_p=0.5, causal=True, window_size=(3, 0)).isfinite().all()
"""


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_the_first_call_of_a_process() -> None:
    """Kernels take factors by whole vectors. Those behind the last key multiply zeros, and what lies on the stack may be
    NaN: it was, in every other process."""
    subprocess.run([sys.executable, "-c", FIRST_CALL], check=True)
