"""The operators torch sees, so that ``torch.compile`` and ``torch.export`` hold one node a call and no graph breaks.

Each operator's argument list *is* the flat form of the problem it carries: the schema is spelled from the fields of
:class:`~pagedflash.problem.AttentionProblem` and :class:`~pagedflash.problem.CacheWrite`. The operators that write to a
cache declare it. Every kernel validates its problem, fake ones too. Eager calls with plain tensors pass by torch's
dispatcher, unless something follows what operators are called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .errors import InvalidArgument, Names
from .plan_cache import Entry
from .problem import K_NEW, AttentionProblem, CacheWrite, _Field, _Flat
from .validate import validate, validate_out, validate_write
from .validate_values import check_values

NAMESPACE = __name__.rpartition(".")[0]
"""The package's own name: "pagedflash", or that of a copy written by ``pagedflash hub``, so that both can be loaded."""

NO_BACKWARD = (
    "pagedflash: attention was asked for its gradient, but there is no backward yet; train with another attention "
    '(attn_implementation="sdpa" in transformers), or call under torch.no_grad()'
)
NO_FORWARD_AD = (
    "pagedflash: {field} carries a tangent of forward-mode AD, expected plain tensors: there is no derivative yet"
)
NO_VMAP_OF_WRITES = "pagedflash: torch.vmap over a write to a cache is not possible; write all sequences in one call"


def attention(problem: AttentionProblem, names: Names, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run a problem: ``(out, lse)``, into ``out`` if it is given. Errors name fields as ``names`` says."""
    try:
        if not torch.compiler.is_compiling():
            if _may_pass_by(problem.entry) and (out is None or out.__class__ is Tensor):
                return dispatch.attention(problem, out)
            _validate(problem, out)  # before the operator's schema turns away what is no tensor
        appends = problem.tensors[K_NEW] is not None
        if out is not None:
            return out, (_ATTENTION_WITH_APPEND_INTO if appends else _ATTENTION_INTO)(*problem.flat, out)
        out, lse = (_ATTENTION_WITH_APPEND if appends else _ATTENTION)(*problem.flat)
        return out, lse
    except InvalidArgument as error:
        raise error.renamed(names) from None


def check(problem: AttentionProblem, names: Names, out: Tensor | None) -> None:
    """Raise what :func:`attention` would raise, for a call that writes something before."""
    if torch.compiler.is_compiling():
        return
    try:
        _validate(problem, out)
        if dispatch.values_wanted(problem.queries.q):
            check_values(problem)
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


def _define(name: str, problem: type[_Flat], returns: str, kernel: Any, fake: Any, mutates: dict[str, str]) -> Any:
    fields = [*problem.TENSOR_FIELDS, *problem.NUMBER_FIELDS]
    if "out" in mutates:
        fields.append(_Field("out", Tensor))
    _library.define(f"{name}({_schema(fields, mutates)}) -> {returns}", tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    _library.impl(name, _without_derivative(operator, problem), "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    torch.library.register_vmap(f"{NAMESPACE}::{name}", _vmap_of(operator, mutates), lib=_library)
    return operator


def _attention(*flat: Any) -> tuple[Tensor, Tensor]:
    return dispatch.attention(AttentionProblem.from_flat(flat))


def _attention_into(*flat_and_out: Any) -> Tensor:
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
    return q.new_empty(problem.out_shape), q.new_empty(problem.lse_shape, dtype=torch.float32)


def _write(*flat: Any) -> None:
    dispatch.kv_write(CacheWrite.from_flat(flat))


def _write_fake(*flat: Any) -> None:
    validate_write(CacheWrite.from_flat(flat), dispatch.backend_for(flat[0]).CAPABILITIES)


class _WithoutBackward(torch.autograd.Function):
    """Forward as it is; whoever asks for a gradient is told that there is none."""

    @staticmethod
    def forward(operator: Any, *flat: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(NO_BACKWARD)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(NO_FORWARD_AD.format(field="an argument"))


def _without_derivative(operator: Any, problem: type[_Flat]) -> Callable[..., Any]:
    """What runs where gradients may be tracked."""

    def run(*flat: Any) -> Any:
        for field, value in zip(problem.TENSOR_FIELDS, flat):
            if value is not None and _has_tangent(value):
                raise NotImplementedError(NO_FORWARD_AD.format(field=field.name))
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in flat):
            return _WithoutBackward.apply(operator, *flat)  # type: ignore[no-untyped-call]
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*flat)

    return run


def _vmap_of(operator: Any, mutates: dict[str, str]) -> Callable[..., Any]:
    """One call for each element of the mapped axis."""

    def run(info: Any, in_dims: tuple[int | None, ...], *flat: Any) -> Any:
        if mutates:
            raise NotImplementedError(NO_VMAP_OF_WRITES)
        elements = [
            operator(*(value if axis is None else value.select(axis, i) for value, axis in zip(flat, in_dims)))
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(results) for results in zip(*elements)), (0, 0)

    return run


_CACHES = {"k": "a", "v": "b", "k_descale": "d", "v_descale": "e"}  # scales if they are one a token and head
_ATTENTION = _define("attention", AttentionProblem, "(Tensor, Tensor)", _attention, _attention_fake, {})
_ATTENTION_WITH_APPEND = _define(
    "attention_with_append", AttentionProblem, "(Tensor, Tensor)", _attention, _attention_fake, _CACHES
)
_OUT = {"out": "c"}
_ATTENTION_INTO = _define("attention_into", AttentionProblem, "Tensor", _attention_into, _attention_into_fake, _OUT)
_ATTENTION_WITH_APPEND_INTO = _define(
    "attention_with_append_into", AttentionProblem, "Tensor", _attention_into, _attention_into_fake, _CACHES | _OUT
)
_WRITE_CACHE = _define("write_cache", CacheWrite, "()", _write, _write_fake, _CACHES)

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
