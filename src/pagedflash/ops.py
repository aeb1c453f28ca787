"""The operators torch sees, so that ``torch.compile`` and ``torch.export`` hold one node a call and no graph breaks.

Each operator's argument list *is* the flat form of the problem it carries: the schema is spelled from the fields of
:class:`~pagedflash.problem.AttentionProblem` and :class:`~pagedflash.problem.CacheWrite`. The operators that write to a
cache declare it. Every kernel validates its problem, fake ones too. Eager calls with plain tensors pass by torch's
dispatcher, unless something follows what operators are called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .backends.backward import Gradients, empty_gradients
from .backends.reference import working_dtype
from .errors import InvalidArgument, Names
from .plan_cache import Entry
from .problem import K_NEW, AttentionProblem, CacheWrite, _Field, _Flat
from .validate import validate, validate_out, validate_write

NAMESPACE = __name__.rpartition(".")[0]
"""The package's own name: "pagedflash", or that of a copy written by ``pagedflash hub``, so that both can be loaded."""

NO_BACKWARD_OF_CACHES = (
    "pagedflash: a gradient was asked for through {what}, where there is none; train with dense or packed keys "
    "(flash_attn_func, flash_attn_varlen_func), or call under torch.no_grad()"
)
NO_BACKWARD_OF_SLOPES = "pagedflash: alibi_slopes requires a gradient, expected constant slopes: there is none for them"
NO_SECOND_DERIVATIVE = (
    "pagedflash: a derivative of attention's gradient was asked for (create_graph=True, or torch.func.grad twice), "
    'which is not there; use another attention (attn_implementation="eager" in transformers)'
)
NO_FORWARD_AD = (
    "pagedflash: {field} carries a tangent of forward-mode AD, expected plain tensors: there is no derivative yet"
)
NO_VMAP_OF_WRITES = "pagedflash: torch.vmap over a write to a cache is not possible; write all sequences in one call"


def attention(
    problem: AttentionProblem, names: Names, out: Tensor | None = None, with_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Run a problem: ``(out, lse)``, into ``out`` if it is given; not ``with_lse``, lse may be None. Errors name fields as
    ``names`` says."""
    try:
        if not torch.compiler.is_compiling():
            if _may_pass_by(problem.entry) and (out is None or out.__class__ is Tensor):
                return dispatch.attention(problem, out, with_lse)
            _validate(problem, out)  # before the operator's schema turns away what is no tensor
        appends = problem.tensors[K_NEW] is not None
        if out is not None:
            return out, (_ATTENTION_WITH_APPEND_INTO if appends else _ATTENTION_INTO)(*problem.flat, out)
        out, lse = _ATTENTION_WITH_APPEND(*problem.flat) if appends else _call(_ATTENTION, *problem.flat)
        return out, lse
    except InvalidArgument as error:
        raise error.renamed(names) from None


def _validate(problem: AttentionProblem, out: Tensor | None) -> None:
    validate(problem, dispatch.backend_for(problem.queries.q).CAPABILITIES)
    if out is not None:
        validate_out(problem, out)


def write_cache(write: CacheWrite, names: Names) -> None:
    """Run a write. Errors name fields as ``names`` says."""
    try:
        if not torch.compiler.is_compiling():
            if _may_pass_by(write.entry):
                dispatch.kv_write(write)
                return
            validate_write(write, dispatch.backend_for(write.cache.k).CAPABILITIES)
        _WRITE_CACHE(*write.flat)
    except InvalidArgument as error:
        raise error.renamed(names) from None


# --------------------------------------------------------------------------------------------------------------------
# Operators
# --------------------------------------------------------------------------------------------------------------------

_library = torch.library.Library(NAMESPACE, "DEF")


def _schema(fields: Sequence[_Field], mutates: dict[str, str]) -> str:
    """Spell fields as operator arguments; ``mutates`` maps a field to its alias set."""
    arguments = []
    for name, kind in fields:
        word = {Tensor: "Tensor", int: "SymInt", float: "float", bool: "bool"}.get(kind, "Tensor")
        alias = f"({mutates[name]}!)" if name in mutates else ""
        # The new tokens are optional here: AttentionProblem has the fields of an append that is not there.
        optional = "?" if word == "Tensor" and (kind is not Tensor or name in ("k_new", "v_new")) else ""
        arguments.append(f"{word}{alias}{optional} {name}")
    return ", ".join(arguments)


def _define(
    name: str,
    problem: type[_Flat],
    returns: str,
    kernel: Any,
    fake: Any,
    mutates: dict[str, str],
    more: tuple[str, ...] = (),
    no_backward: str | None = None,
) -> Any:
    """An operator of a problem's fields and ``more`` tensors. ``no_backward`` says why it has none."""
    fields = [*problem.TENSOR_FIELDS, *problem.NUMBER_FIELDS, *(_Field(tensor, Tensor) for tensor in more)]
    _library.define(f"{name}({_schema(fields, mutates)}) -> {returns}", tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    _library.impl(name, _where_gradients_are_tracked(operator, problem, no_backward), "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    torch.library.register_vmap(f"{NAMESPACE}::{name}", _vmap_of(operator, mutates), lib=_library)
    return operator


def _attention(*flat: Any) -> tuple[Tensor, Tensor | None]:
    return dispatch.attention(AttentionProblem.from_flat(flat))


def _attention_into(*flat_and_out: Any) -> Tensor | None:
    *flat, out = flat_and_out
    return dispatch.attention(AttentionProblem.from_flat(tuple(flat)), out)[1]


def _attention_into_fake(*flat_and_out: Any) -> Tensor:
    *flat, out = flat_and_out
    return _fake_results(AttentionProblem.from_flat(tuple(flat)), out)[1]


def _attention_fake(*flat: Any) -> tuple[Tensor, Tensor]:
    return _fake_results(AttentionProblem.from_flat(flat), None)


def _fake_results(problem: AttentionProblem, out: Tensor | None) -> tuple[Tensor, Tensor]:
    _validate(problem, out)
    q = problem.queries.q
    return q.new_empty(problem.out_shape), q.new_empty(problem.lse_shape, dtype=working_dtype(q))


def _attention_backward(*flat_and_results: Any) -> Gradients:
    *flat, out, lse, d_out, d_lse = flat_and_results
    return dispatch.attention_backward(AttentionProblem.from_flat(tuple(flat)), out, lse, d_out, d_lse)


def _attention_backward_fake(*flat_and_results: Any) -> Gradients:
    return empty_gradients(AttentionProblem.from_flat(flat_and_results[:-4]))


def _write(*flat: Any) -> None:
    dispatch.kv_write(CacheWrite.from_flat(flat))


def _write_fake(*flat: Any) -> None:
    validate_write(CacheWrite.from_flat(flat), dispatch.backend_for(flat[0]).CAPABILITIES)


class _WithoutBackward(torch.autograd.Function):
    """Forward as it is; whoever asks for a gradient is told why there is none."""

    @staticmethod
    def forward(operator: Any, why: str | None, *flat: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.why = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(ctx.why)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(NO_FORWARD_AD.format(field="an argument"))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], operator: Any, why: str | None, *flat: Any) -> Any:
        return _vmap_of(operator, {})(info, in_dims[2:], *flat)


_TENSORS = [name for name, _ in AttentionProblem.TENSOR_FIELDS]


class _WithBackward(_WithoutBackward):
    """Attention, differentiable in q, k, v and the sinks. Saved are the inputs and the results: O(S)."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, *flat = inputs
        tensors, ctx.numbers = flat[: len(_TENSORS)], flat[len(_TENSORS) :]
        cache = (("block_table", "pages"), ("k_descale", "a quantized cache"), ("v_descale", "a quantized cache"))
        through = next((what for field, what in cache if tensors[_TENSORS.index(field)] is not None), None)
        ctx.why = None if through is None else NO_BACKWARD_OF_CACHES.format(what=through)
        if through is None:
            ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> Any:
        if ctx.why is not None:
            raise NotImplementedError(ctx.why)
        if ctx.needs_input_grad[2 + _TENSORS.index("alibi_slopes")]:
            raise NotImplementedError(NO_BACKWARD_OF_SLOPES)
        *tensors, out, lse = ctx.saved_tensors
        d_q, d_k, d_v, d_sinks = _call(_ATTENTION_BACKWARD, *tensors, *ctx.numbers, out, lse, d_out, d_lse)
        gradients = {"q": d_q, "k": d_k, "v": d_v, "sinks": None if tensors[_TENSORS.index("sinks")] is None else d_sinks}
        return None, None, *(gradients.get(name) for name in _TENSORS), *(None for _ in ctx.numbers)


_differentiable: dict[Any, Callable[..., Any]] = {}
"""Operator -> the autograd.Function around it, ready to call."""
_innermost_transform: Callable[[], Any] = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)


def _call(operator: Any, *flat: Any) -> Any:
    """Call an operator that writes nothing. ``torch.func`` takes an autograd.Function, but no operator that calls one."""
    transform = None if torch.compiler.is_compiling() else _innermost_transform()
    if transform is not None and transform.key().name in ("Grad", "Vmap"):
        return _differentiable[operator](*flat)
    return operator(*flat)


def _where_gradients_are_tracked(operator: Any, problem: type[_Flat], no_backward: str | None) -> Callable[..., Any]:
    function = _WithBackward if no_backward is None else _WithoutBackward
    differentiable = _differentiable[operator] = partial(function.apply, operator, no_backward)

    def run(*flat: Any) -> Any:
        for field, value in zip(problem.TENSOR_FIELDS, flat):
            if value is not None and _has_tangent(value):
                raise NotImplementedError(NO_FORWARD_AD.format(field=field.name))
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in flat):
            return differentiable(*flat)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*flat)

    return run


def _vmap_of(operator: Any, mutates: dict[str, str]) -> Callable[..., Any]:
    """One call for each element of the mapped axis."""

    def run(info: Any, in_dims: tuple[int | None, ...], *flat: Any) -> Any:
        if mutates:
            raise NotImplementedError(NO_VMAP_OF_WRITES)
        elements = [
            _call(operator, *(value if axis is None else value.select(axis, i) for value, axis in zip(flat, in_dims)))
            for i in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(results) for results in zip(*elements))
        return stacked, (0,) * len(stacked)

    return run


_CACHES = {"k": "a", "v": "b", "k_descale": "d", "v_descale": "e"}  # scales if they are one a token and head
_OUT = {"out": "c"}
_NO_BACKWARD_OF_APPENDS = NO_BACKWARD_OF_CACHES.format(what="an append to a cache")
_PAIR = "(Tensor, Tensor)"
_ATTENTION = _define("attention", AttentionProblem, _PAIR, _attention, _attention_fake, {})
_ATTENTION_WITH_APPEND = _define(
    "attention_with_append", AttentionProblem, _PAIR, _attention, _attention_fake, _CACHES,
    no_backward=_NO_BACKWARD_OF_APPENDS,
)  # fmt: skip
_ATTENTION_INTO, _ATTENTION_WITH_APPEND_INTO = (
    _define(
        name, AttentionProblem, "Tensor", _attention_into, _attention_into_fake, mutates, ("out",),
        no_backward=_NO_BACKWARD_OF_APPENDS,
    )
    for name, mutates in (("attention_into", _OUT), ("attention_with_append_into", _CACHES | _OUT))
)  # fmt: skip
_WRITE_CACHE = _define("write_cache", CacheWrite, "()", _write, _write_fake, _CACHES, no_backward=_NO_BACKWARD_OF_APPENDS)
_ATTENTION_BACKWARD = _define(
    "attention_backward", AttentionProblem, "(Tensor, Tensor, Tensor, Tensor)",
    _attention_backward, _attention_backward_fake, {}, ("attention_out", "lse", "d_out", "d_lse"),
    no_backward=NO_SECOND_DERIVATIVE,
)  # fmt: skip

# --------------------------------------------------------------------------------------------------------------------
# Past the dispatcher
# --------------------------------------------------------------------------------------------------------------------


def _may_pass_by(entry: Entry | None) -> bool:
    """Whether kernels may be called without torch's dispatcher, which takes longer than all else before a kernel."""
    return entry is not None and entry.is_plain and not is_watched()


def _watch() -> Callable[[], bool]:
    try:  # private names of torch: without them every call goes through the dispatcher
        from torch._C import _get_tracing_state, _len_torch_dispatch_stack
        from torch._C._autograd import _profiler_enabled
        from torch._C._functorch import peek_interpreter_stack
        from torch.autograd import forward_ad

        forward_ad._current_level  # noqa: B018
    except (ImportError, AttributeError):
        return lambda: True

    def is_watched() -> bool:
        return (
            _len_torch_dispatch_stack() > 0
            or peek_interpreter_stack() is not None
            or forward_ad._current_level >= 0
            or _profiler_enabled()
            or _get_tracing_state() is not None
        )

    return is_watched


is_watched = _watch()
"""Whether something follows what operators are called, or stands for their tensors: a tracer, a dispatch mode, a profiler,
a transform of torch.func, forward-mode AD."""


def _has_tangent(tensor: Tensor) -> bool:
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None
