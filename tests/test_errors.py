"""Every wrong call fails before it writes anything, with an exception that names the argument."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import pagedflash

Arguments = dict[str, Any]


def dense(batch: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Arguments:
    return dict(
        q=torch.randn(batch, 3, 2 * kv_heads, dim).to(dtype),
        k=torch.randn(batch, 9, kv_heads, dim).to(dtype),
        v=torch.randn(batch, 9, kv_heads, dim).to(dtype),
    )


def varlen(batch: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Arguments:
    return dict(
        q=torch.randn(3 * batch, 2 * kv_heads, dim).to(dtype),
        k=torch.randn(9 * batch, kv_heads, dim).to(dtype),
        v=torch.randn(9 * batch, kv_heads, dim).to(dtype),
        cu_seqlens_q=torch.arange(batch + 1, dtype=torch.int32) * 3,
        cu_seqlens_k=torch.arange(batch + 1, dtype=torch.int32) * 9,
        max_seqlen_q=3,
        max_seqlen_k=9,
    )


def paged_varlen(batch: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Arguments:
    pages = paged(batch, kv_heads, dim, dtype)
    call = varlen(batch, kv_heads, dim, dtype)
    return call | dict(k=pages["k_cache"], v=pages["v_cache"], block_table=pages["block_table"])


def cached(batch: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Arguments:
    call = paged(batch, kv_heads, dim, dtype)
    del call["block_table"]
    return call | dict(
        k_cache=torch.randn(batch + 1, 12, kv_heads, dim).to(dtype),
        v_cache=torch.randn(batch + 1, 12, kv_heads, dim).to(dtype),
        cache_batch_idx=torch.arange(batch, dtype=torch.int32).flip(0),
    )


def paged(batch: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Arguments:
    return dict(
        q=torch.randn(batch, 2, 2 * kv_heads, dim).to(dtype),
        k_cache=torch.randn(3 * batch + 1, 4, kv_heads, dim).to(dtype),
        v_cache=torch.randn(3 * batch + 1, 4, kv_heads, dim).to(dtype),
        k=torch.randn(batch, 2, kv_heads, dim).to(dtype),
        v=torch.randn(batch, 2, kv_heads, dim).to(dtype),
        rotary_cos=torch.randn(12, dim // 2).to(dtype),
        rotary_sin=torch.randn(12, dim // 2).to(dtype),
        cache_seqlens=torch.full((batch,), 7, dtype=torch.int32),
        block_table=torch.arange(3 * batch, dtype=torch.int32).view(batch, 3),
    )


def write(batch: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Arguments:
    call = paged(batch, kv_heads, dim, dtype)
    return {name: call[name] for name in ("k", "v", "k_cache", "v_cache", "block_table")} | dict(
        seq_lens=call["cache_seqlens"]
    )


def merge(batch: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Arguments:
    out, lse = torch.randn(batch, 3, kv_heads, dim).to(dtype), torch.randn(batch, kv_heads, 3)
    return dict(out_a=out, lse_a=lse, out_b=out.clone(), lse_b=lse.clone())


def quantized(batch: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Arguments:
    call = paged(batch, kv_heads, dim, dtype)
    return call | dict(
        k_cache=call["k_cache"].to(torch.int8),
        v_cache=call["v_cache"].to(torch.float8_e4m3fn),
        k_descale=torch.rand(3 * batch + 1, 4, kv_heads),
        v_descale=torch.rand(batch, kv_heads),
    )


VALID: dict[str, tuple[Callable, Callable[..., Arguments]]] = {
    "dense": (pagedflash.flash_attn_func, dense),
    "varlen": (pagedflash.flash_attn_varlen_func, varlen),
    "paged varlen": (pagedflash.flash_attn_varlen_func, paged_varlen),
    "cached": (pagedflash.flash_attn_with_kvcache, cached),
    "paged": (pagedflash.flash_attn_with_kvcache, paged),
    "quantized": (pagedflash.flash_attn_with_kvcache, quantized),
    "write": (pagedflash.kv_paged_write, write),
    "merge": (pagedflash.merge_attention_states, merge),
}
ATTENTION = ("dense", "varlen", "paged varlen", "cached", "paged")
WITH_CACHE = ("cached", "paged")
WITH_TABLE = ("paged varlen", "paged", "write")


class Wrong:
    """One way to spoil one argument: in which functions, and how. ``named`` is what the message must hold."""

    def __init__(self, label: str, argument: str, where: tuple[str, ...], spoil: Callable, named: str | None = None):
        self.label, self.argument, self.where, self.spoil = label, argument, where, spoil
        self.named = argument if named is None else named

    def __repr__(self) -> str:
        return f"{self.argument} {self.label}"


def set_entry(value: int, *index: int) -> Callable[[Tensor], Tensor]:
    def spoil(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        copy[index] = value
        return copy

    return spoil


def other_dtype(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float16 if tensor.dtype == torch.float32 else torch.float32)


def is_cache(name: str, where: str) -> bool:
    """Whether the argument may have a format of its own."""
    return name.endswith("_cache") or (where == "paged varlen" and name in ("k", "v"))


def constant(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


TENSORS = {
    **dict.fromkeys(("k", "v"), ("dense", "varlen", "paged varlen")),
    "q": ATTENTION,
    **dict.fromkeys(("k_cache", "v_cache", "rotary_cos", "rotary_sin"), WITH_CACHE),
}
EVERY_TENSOR = [
    *TENSORS.items(),
    ("k", (*WITH_CACHE, "write")),
    ("v", (*WITH_CACHE, "write")),
    ("k_cache", ("write",)),
    ("v_cache", ("write",)),
]
INDICES = {
    "cu_seqlens_q": ("varlen", "paged varlen"),
    "cu_seqlens_k": ("varlen", "paged varlen"),
    "cache_seqlens": WITH_CACHE,
    "cache_batch_idx": ("cached",),
    "block_table": WITH_TABLE,
    "seq_lens": ("write",),
}

WRONG = [
    # types, dtypes, devices, ranks
    *(
        Wrong("of another dtype", name, tuple(w for w in where if not is_cache(name, w)), other_dtype, "")
        for name, where in EVERY_TENSOR
        if name != "q"
    ),
    # formats of a cache
    *(
        Wrong("of int8 without scales", name, (where,), lambda t: t.to(torch.int8), f"{name[0]}_descale")
        for name, all_where in EVERY_TENSOR
        for where in all_where
        if is_cache(name, where)
    ),
    Wrong("of uint8", "k_cache", (*WITH_CACHE, "write"), lambda t: t.to(torch.uint8)),
    Wrong("given to float32 keys", "k_descale", (*WITH_CACHE, "write", "paged varlen"), constant(torch.ones(()))),
    Wrong("of q", "q_descale", (*WITH_CACHE, "paged varlen"), constant(torch.ones(()))),
    Wrong("missing", "k_descale", ("quantized",), constant(None)),
    Wrong("missing", "v_descale", ("quantized",), constant(None)),
    Wrong("a number", "k_descale", ("quantized",), constant(0.5)),
    Wrong("of float16", "k_descale", ("quantized",), lambda t: t.half()),
    Wrong("on another device", "v_descale", ("quantized",), lambda t: t.to("meta")),
    Wrong("with a head more", "v_descale", ("quantized",), lambda t: torch.cat((t, t), -1)),
    Wrong("one page short", "k_descale", ("quantized",), lambda t: t[1:]),
    Wrong("with an axis more", "k_descale", ("quantized",), lambda t: t[..., None]),
    Wrong("holding NaN for int8", "k", ("quantized",), set_entry(math.nan, 1, 0, 0, 3)),
    Wrong("past the cache", "cache_seqlens", ("quantized",), set_entry(11, 0)),
    *(Wrong("of dtype float64", name, where, lambda t: t.double(), "") for name, where in EVERY_TENSOR),
    *(Wrong("of an integer dtype", name, where, lambda t: t.int(), "") for name, where in EVERY_TENSOR),
    *(Wrong("a list", name, where, lambda t: t.tolist()) for name, where in EVERY_TENSOR),
    *(Wrong("on another device", name, where, lambda t: t.to("meta"), "") for name, where in EVERY_TENSOR),
    *(Wrong("with an axis too few", name, where, lambda t: t[0]) for name, where in EVERY_TENSOR),
    *(Wrong("with an axis too many", name, where, lambda t: t[None]) for name, where in EVERY_TENSOR),
    *(Wrong("of a float dtype", name, where, lambda t: t.float()) for name, where in INDICES.items()),
    *(Wrong("a list", name, where, lambda t: t.tolist()) for name, where in INDICES.items()),
    *(Wrong("one entry short", name, where, lambda t: t[:-1], "") for name, where in INDICES.items()),
    *(Wrong("with an axis too many", name, where, lambda t: t[None]) for name, where in INDICES.items()),
    *(Wrong("on another device", name, where, lambda t: t.to("meta")) for name, where in INDICES.items()),
    # heads and head_dim
    Wrong("with heads that k's do not divide", "q", ATTENTION, lambda q: torch.cat((q, q[..., :1, :]), -2), "heads"),
    Wrong("without heads", "q", ATTENTION, lambda q: q[..., :0, :], "heads"),
    Wrong("of another head_dim", "q", ATTENTION, lambda q: q[..., :8], "head_dim"),
    Wrong("of head_dim 0", "q", ATTENTION, lambda q: q[..., :0], "head_dim"),
    Wrong("wider than any", "v", ("dense", "varlen", "paged varlen"), lambda v: torch.cat((v,) * 200, -1), "head_dim"),
    Wrong("wider than any", "v_cache", WITH_CACHE, lambda v: torch.cat((v,) * 200, -1), "head_dim"),
    Wrong("with a head more", "v", ("dense", "varlen", "paged varlen"), lambda v: torch.cat((v, v), -2)),
    Wrong("with a head more", "v_cache", (*WITH_CACHE, "write"), lambda v: torch.cat((v, v), -2)),
    Wrong("with a head more", "k", (*WITH_CACHE, "write"), lambda k: torch.cat((k, k), -2)),
    Wrong("of another length than k", "v", (*ATTENTION, "write"), lambda v: v[:, :1] if v.dim() == 4 else v[:1]),
    Wrong("with a row less", "k", ("dense",), lambda k: k[1:]),
    Wrong("strided in its last axis", "k_cache", (*WITH_CACHE, "write"), lambda k: torch.cat((k, k), -1)[..., ::2]),
    # lengths and tables
    Wrong("past the cache", "cache_seqlens", WITH_CACHE, set_entry(11, 0)),
    Wrong("far past the cache", "cache_seqlens", WITH_CACHE, set_entry(2**31 - 1, 0)),
    Wrong("below -1", "cache_seqlens", WITH_CACHE, set_entry(-2, 0)),
    Wrong("None with new keys", "cache_seqlens", WITH_CACHE, constant(None)),
    Wrong("an int past the cache", "cache_seqlens", WITH_CACHE, constant(11)),
    Wrong("a float", "cache_seqlens", WITH_CACHE, constant(3.0)),
    Wrong("past the pages", "seq_lens", ("write",), set_entry(11, 0)),
    Wrong("below -1", "seq_lens", ("write",), set_entry(-2, 0)),
    Wrong("None", "seq_lens", ("write",), constant(None)),
    Wrong("with a used entry of -1", "block_table", ("paged varlen", "paged"), set_entry(-1, 0, 0)),
    Wrong("with a used entry of -1", "block_table", ("write",), set_entry(-1, 0, 1)),
    Wrong("with a used entry past the pages", "block_table", WITH_TABLE, set_entry(10**6, 0, 2)),
    Wrong("with an int64 entry past int32", "block_table", WITH_TABLE, lambda t: t.long() + 2**32),
    Wrong("too narrow", "block_table", WITH_TABLE, lambda t: t[:, :1], ""),
    Wrong("empty in its second axis", "block_table", WITH_TABLE, lambda t: t[:, :0], ""),
    Wrong("None", "block_table", ("write",), constant(None)),
    Wrong("not a page", "cache_batch_idx", ("cached",), set_entry(99, 0)),
    Wrong("negative", "cache_batch_idx", ("cached",), set_entry(-1, 0)),
    Wrong("together with block_table", "cache_batch_idx", ("paged",), constant(torch.zeros(2, dtype=torch.int32)), ""),
    Wrong(
        "together with block_table",
        "page_table",
        ("paged varlen", "paged"),
        constant(torch.zeros(2, 3, dtype=torch.int32)),
    ),
    Wrong(
        "past the sequence",
        "cache_leftpad",
        WITH_CACHE,
        constant(torch.full((2,), 50, dtype=torch.int32)),
        "cache_leftpad",
    ),
    Wrong("not starting with 0", "cu_seqlens_q", ("varlen", "paged varlen"), set_entry(1, 0)),
    Wrong("falling", "cu_seqlens_q", ("varlen", "paged varlen"), set_entry(-3, 1)),
    Wrong("past q", "cu_seqlens_q", ("varlen", "paged varlen"), set_entry(10**6, -1)),
    Wrong("not starting with 0", "cu_seqlens_k", ("varlen", "paged varlen"), set_entry(1, 0)),
    Wrong("falling", "cu_seqlens_k", ("varlen", "paged varlen"), set_entry(-3, 1)),
    Wrong("past k", "cu_seqlens_k", ("varlen", "paged varlen"), set_entry(10**6, -1)),
    Wrong("None", "cu_seqlens_q", ("varlen", "paged varlen"), constant(None)),
    Wrong("None", "cu_seqlens_k", ("varlen", "paged varlen"), constant(None)),
    Wrong("too small", "max_seqlen_q", ("varlen", "paged varlen"), constant(2)),
    Wrong("negative", "max_seqlen_q", ("varlen", "paged varlen"), constant(-1)),
    Wrong("a float", "max_seqlen_q", ("varlen", "paged varlen"), constant(3.0)),
    Wrong("negative", "max_seqlen_k", ("varlen", "paged varlen"), constant(-1)),
    Wrong("None", "max_seqlen_k", ("varlen", "paged varlen"), constant(None)),
    Wrong(
        "longer than its sequence",
        "seqused_q",
        ("varlen", "paged varlen"),
        constant(torch.full((2,), 4, dtype=torch.int32)),
        "seqused_q",
    ),
    Wrong(
        "longer than its sequence",
        "seqused_k",
        ("varlen",),
        constant(torch.full((2,), 10, dtype=torch.int32)),
        "seqused_k",
    ),
    Wrong(
        "past the pages",
        "seqused_k",
        ("paged varlen",),
        constant(torch.full((2,), 13, dtype=torch.int32)),
        "seqused_k",
    ),
    # appended tokens and rotary
    Wrong("None, v given", "k", (*WITH_CACHE, "write"), constant(None)),
    Wrong("None, k given", "v", (*WITH_CACHE, "write"), constant(None)),
    Wrong("None, sin given", "rotary_cos", WITH_CACHE, constant(None)),
    Wrong("None, cos given", "rotary_sin", WITH_CACHE, constant(None)),
    Wrong("too short", "rotary_cos", WITH_CACHE, lambda t: t[:8]),
    Wrong("too short", "rotary_sin", WITH_CACHE, lambda t: t[:8]),
    Wrong("wider than head_dim", "rotary_cos", WITH_CACHE, lambda t: torch.cat((t, t), -1), "rotary"),
    # scores
    *(Wrong(f"= {value}", "softmax_scale", ATTENTION, constant(value)) for value in (math.nan, math.inf, "1")),
    *(Wrong(f"= {value}", "softcap", ATTENTION, constant(value)) for value in (-1.0, math.nan, math.inf, None)),
    *(
        Wrong(f"= {value}", "window_size", ATTENTION, constant(value))
        for value in (5, (1,), (1, 2, 3), (-2, 0), (0, -7), (1.5, 0), None)
    ),
    *(Wrong(f"= {value}", "dropout_p", ATTENTION, constant(value)) for value in (-0.1, 1.0, math.nan, None)),
    *(Wrong(f"= {value}", "num_splits", WITH_CACHE, constant(value)) for value in (-1, 1.5)),
    Wrong("of another length", "alibi_slopes", ATTENTION, constant(torch.ones(31))),
    Wrong("of dtype float16", "alibi_slopes", ATTENTION, constant(torch.ones(2).half())),
    Wrong("a number", "alibi_slopes", ATTENTION, constant(0.5)),
    Wrong("of another length", "s_aux", ATTENTION, constant(torch.ones(31))),
    Wrong("with an axis too many", "s_aux", ATTENTION, constant(torch.ones(1, 2))),
    Wrong("of an integer dtype", "s_aux", ATTENTION, constant(torch.ones(2, dtype=torch.int32))),
    Wrong("a number", "s_aux", ATTENTION, constant(0.5)),
    Wrong("of another length", "learnable_sink", ATTENTION, constant(torch.ones(31))),
    # merging
    *(Wrong("of another dtype", name, ("merge",), other_dtype) for name in ("out_b",)),
    *(Wrong("in float16", name, ("merge",), lambda t: t.half()) for name in ("lse_a", "lse_b")),
    *(Wrong("with a row less", name, ("merge",), lambda t: t[..., 1:]) for name in ("out_b", "lse_a", "lse_b")),
    *(Wrong("with an axis too few", name, ("merge",), lambda t: t[0], "") for name in ("out_a", "out_b", "lse_a", "lse_b")),
    *(Wrong("a list", name, ("merge",), lambda t: t.tolist()) for name in ("out_a", "out_b", "lse_a", "lse_b")),
]
PAIRS = [(where, wrong) for wrong in WRONG for where in wrong.where]


def attempt(function: Callable, arguments: Arguments, named: str) -> None:
    """The call must raise, name the argument, and leave every tensor bit for bit as it was."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor) and value.device.type != "meta"}
    before = {name: value.detach().clone() for name, value in tensors.items()}
    with pytest.raises((ValueError, TypeError)) as caught:
        function(**arguments)
    message = str(caught.value)
    assert message.startswith("pagedflash: ") and "expected" in message, message
    assert named in message, message
    for name, value in tensors.items():
        torch.testing.assert_close(value.detach(), before[name], rtol=0, atol=0, equal_nan=True)


def test_there_are_enough_wrong_calls():
    assert len(PAIRS) >= 200


@pytest.mark.parametrize("where", VALID)
def test_the_unspoiled_calls_are_valid(where):
    function, build = VALID[where]
    function(**build(2, 2, 32, torch.float32))


def test_float32_is_the_widest_format_of_queries():
    """A cache may be narrower than float32 queries, not another 16-bit format than 16-bit ones."""
    for cache in ("k_cache", "v_cache"):
        arguments = paged(2, 2, 32, torch.float16)
        arguments[cache] = arguments[cache].bfloat16()
        attempt(pagedflash.flash_attn_with_kvcache, arguments, cache)


@pytest.mark.parametrize(("where", "wrong"), PAIRS, ids=lambda value: str(value))
def test_wrong_call(where: str, wrong: Wrong):
    function, build = VALID[where]
    arguments = build(2, 2, 32, torch.float32)
    arguments[wrong.argument] = wrong.spoil(arguments.get(wrong.argument))
    attempt(function, arguments, wrong.named)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_wrong_calls_of_any_shape_and_dtype(data: st.DataObject):
    """The same, at other sizes and dtypes, with a second wrong argument beside the first half of the time."""
    where, wrong = data.draw(st.sampled_from(PAIRS))
    function, build = VALID[where]
    shape = data.draw(st.tuples(st.integers(2, 3), st.integers(2, 3), st.sampled_from((16, 32, 128))))
    arguments = build(*shape, data.draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16))))
    arguments[wrong.argument] = wrong.spoil(arguments.get(wrong.argument))
    second = data.draw(st.sampled_from([w for place, w in PAIRS if place == where]))
    # (Lengths that are all one entry short make a valid call of one sequence less, an int8 cache and its scale a cache.)
    agree = {second.label, wrong.label} in ({"one entry short"}, {"of int8 without scales", "given to float32 keys"})
    if second.argument != wrong.argument and not agree and data.draw(st.booleans()):
        arguments[second.argument] = second.spoil(arguments.get(second.argument))
    attempt(function, arguments, "")


def test_two_sequences_may_not_append_to_one_slot():
    arguments = paged(2, 2, 32, torch.float32)
    arguments["block_table"][1] = arguments["block_table"][0]
    attempt(pagedflash.flash_attn_with_kvcache, arguments, "block_table")
    arguments = cached(2, 2, 32, torch.float32)
    arguments["cache_batch_idx"][:] = 0
    attempt(pagedflash.flash_attn_with_kvcache, arguments, "cache_batch_idx")


def test_unused_table_entries_may_be_anything():
    arguments = paged(2, 2, 32, torch.float32)
    arguments["cache_seqlens"][0] = 2
    arguments["block_table"][0, 1:] = torch.tensor([-1, 2**31 - 1])
    assert pagedflash.flash_attn_with_kvcache(**arguments).isfinite().all()


def test_gradients_are_fine_where_grad_mode_is_off():
    arguments = dense(2, 2, 32, torch.float32)
    arguments["q"].requires_grad_()
    with torch.no_grad():
        assert not pagedflash.flash_attn_func(**arguments).requires_grad


@pytest.mark.parametrize("function", [value for value, _ in VALID.values()], ids=list(VALID))
def test_every_argument_is_named(function):
    """Callers discover support with inspect.signature."""
    kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}


def test_signatures_are_flash_attns():
    """Order and defaults of flash-attn 2.8; the newer names are keyword-only behind them."""
    expected = {
        pagedflash.flash_attn_func: "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic "
        "return_attn_probs",
        pagedflash.flash_attn_varlen_func: "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p "
        "softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs block_table",
        pagedflash.flash_attn_with_kvcache: "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx "
        "cache_leftpad block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits "
        "return_softmax_lse",
    }
    defaults = dict(
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        rotary_interleaved=True,
        num_splits=0,
    )
    for function, names in expected.items():
        parameters = inspect.signature(function).parameters
        positional = [p.name for p in parameters.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        assert positional == names.split()
        for name, default in defaults.items():
            assert name not in parameters or parameters[name].default == default
        assert {"s_aux", "learnable_sink", "return_softmax_lse"} <= set(parameters)


def test_options_that_dense_and_varlen_share_are_identical():
    """transformers filters the keyword arguments of the one by the signature of the other."""
    one = inspect.signature(pagedflash.flash_attn_func).parameters
    other = inspect.signature(pagedflash.flash_attn_varlen_func).parameters
    for name, parameter in one.items():
        assert other[name].default == parameter.default, name


def test_return_values_follow_flash_attn():
    arguments = dense(2, 2, 32, torch.float32)
    out, lse, probabilities = pagedflash.flash_attn_func(**arguments, return_attn_probs=True)
    assert out.shape == (2, 3, 4, 32) and lse.shape == (2, 4, 3) and lse.dtype == torch.float32
    assert probabilities.numel() == 0
    assert len(pagedflash.flash_attn_func(**arguments, return_softmax_lse=True)) == 2
    assert isinstance(pagedflash.flash_attn_with_kvcache(**paged(2, 2, 32, torch.float32)), Tensor)


ANOTHER_CALL: dict[str, Callable[[Arguments], Arguments]] = {
    "options": lambda call: dict(causal=True, softcap=5.0, window_size=(2, 0)),
    "a list for a tuple": lambda call: dict(window_size=[2, 0]),
    "int64": lambda call: dict(cache_seqlens=call["cache_seqlens"].long(), block_table=call["block_table"].long()),
    "an int for lengths": lambda call: dict(cache_seqlens=5),
    "strided queries": lambda call: dict(q=call["q"].transpose(2, 3).contiguous().transpose(2, 3)),
    "sinks": lambda call: dict(s_aux=torch.ones(call["q"].shape[2])),
    "sinks in bfloat16": lambda call: dict(s_aux=torch.ones(call["q"].shape[2], dtype=torch.bfloat16)),
    "sinks by their other name": lambda call: dict(learnable_sink=torch.ones(call["q"].shape[2])),
    "a table by its other name": lambda call: dict(block_table=None, page_table=call["block_table"]),
    "other values": lambda call: {name: call[name] + 1 for name in ("q", "k_cache", "v_cache")},
}


@pytest.mark.parametrize("change", ANOTHER_CALL)
def test_a_kept_plan_changes_no_other_call(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call gives what it gives as the first of its process, after itself and after another one."""

    def run(arguments: Arguments) -> Tensor:
        caches = {name: arguments[name].clone() for name in ("k_cache", "v_cache")}
        return pagedflash.flash_attn_with_kvcache(**arguments | caches)

    call = paged(2, 2, 16, torch.float32)
    other = call | ANOTHER_CALL[change](call)
    alone = []
    for arguments in (call, other):
        monkeypatch.setattr("pagedflash.plan_cache._entries", {})
        alone.append(run(arguments))
    monkeypatch.setattr("pagedflash.plan_cache._entries", {})
    for _ in range(2):
        for arguments, expected in zip((call, other), alone):
            assert torch.equal(run(arguments), expected)


def test_values_are_checked_again_where_a_plan_is_kept() -> None:
    call = paged(2, 2, 16, torch.float32)
    for _ in range(2):
        pagedflash.flash_attn_with_kvcache(**call)
    call["cache_seqlens"][1] = 1000
    with pytest.raises(ValueError, match="cache_seqlens is 1000"):
        pagedflash.flash_attn_with_kvcache(**call)


@pytest.mark.parametrize("name, value", (("num_splits", 1.0), ("window_size", (2.0, 0)), ("softcap", torch.tensor(5.0))))
def test_what_only_equals_a_kept_option_is_rejected(name: str, value: Any) -> None:
    call = paged(2, 2, 16, torch.float32) | dict(num_splits=1, window_size=(2, 0), softcap=5.0)
    for _ in range(2):
        pagedflash.flash_attn_with_kvcache(**call)
    with pytest.raises(TypeError, match=name):
        pagedflash.flash_attn_with_kvcache(**call | {name: value})


def test_errors_speak_the_names_that_the_caller_used() -> None:
    """Of shapes and of values, past the dispatcher and through it."""
    call = paged(2, 2, 16, torch.float32)
    table = call.pop("block_table")
    for wrong in (table.clone().fill_(-1), table[0], table.float()):
        with pytest.raises((ValueError, TypeError), match="page_table is"):
            pagedflash.flash_attn_with_kvcache(**call, page_table=wrong)
        with pytest.raises((ValueError, TypeError), match="page_table is"):
            pagedflash.flash_attn_with_kvcache(**call | dict(q=call["q"].clone().requires_grad_()), page_table=wrong)
    with pytest.raises(ValueError, match="learnable_sink is"):
        pagedflash.flash_attn_func(**dense(2, 2, 16, torch.float32), learnable_sink=torch.ones(1))
    with pytest.raises(ValueError, match="seq_lens is 99"):
        pagedflash.kv_paged_write(**write(2, 2, 16, torch.float32) | dict(seq_lens=99))


def test_a_value_with_braces_is_printed_as_it_is() -> None:
    with pytest.raises(ValueError, match=r"window_size is \{'k': '\{v\}'\}"):
        pagedflash.flash_attn_func(**dense(2, 2, 16, torch.float32), window_size={"k": "{v}"})


@pytest.mark.parametrize("appends", [False, True])
def test_table_entries_left_of_a_window_may_be_anything(appends: bool) -> None:
    """Engines free the pages that a sliding window has left, and put -1 in their place."""
    torch.manual_seed(0)
    pages = torch.randn(2, 16, 4, 2, 16)
    q, new = torch.randn(1, 2, 4, 16), torch.randn(1, 2, 2, 16) if appends else None
    table = torch.randperm(16, dtype=torch.int32)[None]
    freed = table.clone()
    freed[:, : (50 + 2 * appends - 2 - 10) // 4] = -1

    def run(table: Tensor) -> Tensor:
        k_cache, v_cache = pages.clone()
        return pagedflash.flash_attn_with_kvcache(
            q, k_cache, v_cache, new, new, cache_seqlens=50, block_table=table, causal=True, window_size=(10, 0)
        )

    for backend in ("reference", "cpu"):
        with pagedflash.use_backend(backend):
            assert torch.equal(run(freed), run(table))
            one_more = freed.clone()
            one_more[:, : (50 + 2 * appends - 2 - 10) // 4 + 1] = -1
            with pytest.raises(ValueError, match="block_table is -1"):
                run(one_more)


@pytest.mark.parametrize("dtype", (torch.int8, torch.float8_e5m2, torch.float16), ids=str)
def test_a_dense_cache_of_another_format_is_whole_without_lengths(dtype: torch.dtype) -> None:
    q = torch.randn(2, 1, 4, 8)
    k, v = (torch.randint(-3, 4, (2, 9, 2, 8)).to(dtype) for _ in range(2))
    scale = torch.tensor(0.5)
    scales = {} if dtype == torch.float16 else dict(k_descale=scale, v_descale=scale.clone())
    factor = 0.5 if scales else 1.0
    out = pagedflash.flash_attn_with_kvcache(q, k, v, **scales)
    torch.testing.assert_close(out, pagedflash.flash_attn_func(q, k.float() * factor, v.float() * factor))


def mla(first: int, per_token: bool, same: bool) -> Arguments:
    """Quantized keys of 24, and values that are 16 elements of them from ``first`` on."""
    k_cache, k = torch.zeros(1, 8, 1, 24, dtype=torch.int8), torch.randn(1, 2, 1, 24)
    k_descale = torch.zeros(1, 8, 1) if per_token else torch.tensor(0.05)
    return dict(
        q=torch.randn(1, 1, 4, 24), k_cache=k_cache, v_cache=k_cache[..., first : first + 16], cache_seqlens=0,
        k=k, v=k[..., first : first + 16], k_descale=k_descale, v_descale=k_descale if same else k_descale.clone(),
    )  # fmt: skip


@pytest.mark.parametrize("per_token", (False, True))
def test_scales_of_values_that_are_a_part_of_keys(per_token: bool) -> None:
    pagedflash.flash_attn_with_kvcache(**mla(0, per_token, True))
    for first, same, message in (
        (0, False, "v_descale is another tensor than k_descale, while v_cache is the first part of k_cache"),
        (8, True, "v_cache is a part of k_cache that is not its first"),
        (8, False, "v_cache is a part of k_cache that is not its first"),
    ):
        call = mla(first, per_token, same)
        with pytest.raises(ValueError, match=message):
            pagedflash.flash_attn_with_kvcache(**call)
        assert not call["k_cache"].any() and (not per_token or not call["k_descale"].any())


@pytest.mark.parametrize("writes_only", (False, True))
def test_separate_caches_do_not_share_the_scales_of_tokens(writes_only: bool) -> None:
    scales, new = torch.zeros(2, 4, 1), torch.randn(2, 1, 2, 1, 8)
    k_cache, v_cache = torch.zeros(2, 2, 4, 1, 8, dtype=torch.int8)
    table = torch.tensor([[1, 0]], dtype=torch.int32)
    options = dict(k_descale=scales, v_descale=scales, block_table=table)
    with pytest.raises(ValueError, match="v_descale is the same tensor as k_descale, expected a tensor of its own"):
        if writes_only:
            pagedflash.kv_paged_write(*new, k_cache, v_cache, seq_lens=0, **options)
        else:
            q = torch.randn(1, 2, 1, 8)
            pagedflash.flash_attn_with_kvcache(q, k_cache, v_cache, *new, cache_seqlens=0, **options)
    assert not scales.any() and not k_cache.any() and not v_cache.any()


@pytest.mark.parametrize("causal", (True, False))
def test_every_query_has_a_row_of_the_rotary_tables(causal: bool) -> None:
    """There may be more queries than new tokens. Without a window all are rotated alike, and no row lacks."""
    q, new, caches = torch.randn(1, 5, 1, 8), torch.randn(2, 1, 1, 1, 8), torch.zeros(2, 1, 8, 1, 8)

    def call(rows: int) -> Tensor:
        tables = dict(rotary_cos=torch.ones(rows, 2), rotary_sin=torch.zeros(rows, 2))
        return pagedflash.flash_attn_with_kvcache(q, *caches, *new, cache_seqlens=7, causal=causal, **tables)

    call(12)
    caches.zero_()
    if causal:
        with pytest.raises(ValueError, match="rotary_cos is of 11 positions, with a query at position 11, expected"):
            call(11)
        assert not caches.any()
    else:
        call(8)


@pytest.mark.parametrize("causal", (True, False))
def test_queries_of_a_full_cache_have_a_row_of_the_rotary_tables(causal: bool) -> None:
    """Without new tokens they come behind its last slot."""
    q, new, caches, table = torch.randn(1, 1, 1, 8), torch.randn(1, 0, 1, 8), torch.zeros(2, 1, 8, 1, 8), torch.ones(9, 2)

    def call(rows: int) -> Tensor:
        tables = dict(rotary_cos=table[:rows], rotary_sin=table[:rows])
        return pagedflash.flash_attn_with_kvcache(q, *caches, new, new, cache_seqlens=8, causal=causal, **tables)

    call(9)
    with pytest.raises(ValueError, match="rotary_cos is of 8 positions, with a query at position 8, expected"):
        call(8)


@pytest.mark.parametrize("causal", ("False", "no", 2))
def test_a_flag_is_true_or_false(causal: Any) -> None:
    q = torch.randn(1, 2, 1, 8)
    with pytest.raises(TypeError, match=f"causal is {causal!r}, expected True or False"):
        pagedflash.flash_attn_func(q, q, q, causal=causal)
