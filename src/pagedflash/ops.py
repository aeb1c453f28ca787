"""The operators torch sees, so that ``torch.compile`` and ``torch.export`` hold one node a call and no graph breaks.

Each operator's argument list *is* the description it carries: the schema is spelled from the fields of
:class:`~pagedflash.call.AttentionCall` and :class:`~pagedflash.call.CacheWrite`. The operators that write to a cache
declare it. The fake kernels stand beside the real ones.
"""

from __future__ import annotations

from typing import get_args, get_type_hints

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._autograd import _profiler_enabled

from . import dispatch
from .call import AttentionCall, CacheWrite

NAMESPACE = __name__.rpartition(".")[0]
"""The package's own name: "pagedflash", or that of a copy written by ``pagedflash hub``, so that both can be loaded."""

_library = torch.library.Library(NAMESPACE, "DEF")


def _schema(description: type, mutates: dict[str, str]) -> str:
    """Spell the fields of a description as operator arguments; ``mutates`` maps a field to its alias set."""
    arguments = []
    for field, hint in get_type_hints(description).items():
        kind, optional = (get_args(hint)[0], True) if type(None) in get_args(hint) else (hint, False)
        word = {Tensor: "Tensor", int: "SymInt", float: "float", bool: "bool"}[kind]
        alias = f"({mutates[field]}!)" if field in mutates else ""
        arguments.append(f"{word}{alias}{'?' if optional else ''} {field}")
    return ", ".join(arguments)


def _define(name: str, description: type, returns: str, kernel, fake, mutates: dict[str, str]):  # type: ignore[no-untyped-def]
    _library.define(f"{name}({_schema(description, mutates)}) -> {returns}", tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _attention(*fields: object) -> tuple[Tensor, Tensor]:
    return dispatch.attention(AttentionCall(*fields))  # type: ignore[arg-type]


def _attention_fake(*fields: object) -> tuple[Tensor, Tensor]:
    call = AttentionCall(*fields)  # type: ignore[arg-type]
    return call.q.new_empty(call.out_shape), call.q.new_empty(call.lse_shape, dtype=torch.float32)


def _write_cache(*fields: object) -> None:
    dispatch.kv_write(CacheWrite(*fields))  # type: ignore[arg-type]


def _write_cache_fake(*fields: object) -> None:
    return None


attention = _define("attention", AttentionCall, "(Tensor, Tensor)", _attention, _attention_fake, {})
attention_with_append = _define(
    "attention_with_append", AttentionCall, "(Tensor, Tensor)", _attention, _attention_fake, {"k": "a", "v": "b"}
)
write_cache = _define("write_cache", CacheWrite, "()", _write_cache, _write_cache_fake, {"k_cache": "a", "v_cache": "b"})


def is_watched() -> bool:
    """Whether something follows what operators are called: a tracer, a dispatch mode or a profiler.

    Where nothing does, calls with plain tensors need not pass through torch's dispatcher, which takes longer than all else
    that a call does before its kernel.
    """
    return _len_torch_dispatch_stack() > 0 or _profiler_enabled() or _get_tracing_state() is not None
