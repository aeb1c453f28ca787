"""Which backend runs a problem: from its device to one of the modules with the four kernels.

Where the device's backend is unavailable or does not support a problem, the reference runs and a warning says why, once for
each reason.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .backends import backward, reference
from .backends.protocol import Backend, Support
from .problem import K_DESCALE, K_NEW, V_DESCALE, WRITE, AttentionProblem, CacheWrite, K, Tensors, V, is_per_token
from .scoped import Scoped
from .validate import validate, validate_out, validate_scales, validate_write
from .validate_values import check_new_tokens, check_values, check_write_values

CHECK_VARIABLE = "PAGEDFLASH_CHECK"
"""Set to 1, this environment variable has lengths and table entries checked on every device, not only on CPUs."""

BACKEND_MODULES = {
    "reference": ".backends.reference",
    "cpu": ".backends.cpu",
    "metal": ".backends.metal",
    "triton": ".backends.triton",
}
DEVICE_BACKENDS = {"cpu": "cpu", "mps": "metal", "cuda": "triton", "xpu": "triton"}
"""Device type -> the backend written for it. Any other device runs the reference."""


class CallKind(NamedTuple):
    """What :func:`count_calls` counts by."""

    layout: str  # AttentionProblem.layout, or "write" for kv_paged_write
    backend: str
    device: str


OUT_ALIGNMENT = 16
"""Bytes. Kernels store the output in pieces of this size."""

_bump_versions: Callable[[Iterable[Tensor]], None] = getattr(
    torch._C, "_increment_version", torch.autograd.graph.increment_version
)
"""Kernels write to tensors behind autograd's back: a graph that saved one must find out. The private function, where torch
has it, does without an ``isinstance`` that takes as long as the rest."""

_forced = Scoped[str]("pagedflash_backend")
_counters: list[Counter[CallKind]] = []


def attention(problem: AttentionProblem, out: Tensor | None = None, with_lse: bool = True) -> tuple[Tensor, Tensor | None]:
    """Validate a problem and run it on its device's backend: ``(out, lse)``. ``out`` may have any strides; not ``with_lse``,
    lse may be None."""
    q = problem.tensors[0]
    assert q is not None
    backend, entry = backend_for(q), problem.entry
    if entry is None or entry.ready_for is not backend:
        validate(problem, backend.CAPABILITIES)
        support = problem.plan((backend.NAME, "support"), backend.supports)
        if not support.ok:
            _warn_once(backend.NAME, support.reason)
            backend = reference
        elif entry is not None:
            entry.ready_for = backend
    if not backend.CAPABILITIES.checks_values and values_wanted(q):
        check_values(problem)
    tensors = problem.tensors
    appends = tensors[K_NEW] is not None
    k_descale, v_descale = tensors[K_DESCALE], tensors[V_DESCALE]
    appends_scales = appends and (k_descale is not None or v_descale is not None)
    if k_descale is not None and v_descale is not None:
        validate_scales(tensors[K], tensors[V], k_descale, v_descale, appends)  # type: ignore[arg-type]
    if appends_scales and values_wanted(q):
        check_new_tokens(tensors[WRITE])
    if _counters:
        _count(CallKind(problem.layout, backend.NAME, q.device.type))
    results = backend.attention(problem, out, with_lse) if out is None else _attention_into(problem, backend, out, with_lse)
    if appends:
        _bump_versions(_written(tensors[WRITE]) if appends_scales else (tensors[K], tensors[V]))  # type: ignore[arg-type]
    return results


def _attention_into(
    problem: AttentionProblem, backend: Backend, out: Tensor, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    validate_out(problem, out)
    if out.is_contiguous() and out.data_ptr() % OUT_ALIGNMENT == 0:
        _, lse = backend.attention(problem, out, with_lse)
        _bump_versions((out,))
    else:
        result, lse = backend.attention(problem, None, with_lse)
        out.copy_(result)
    return out, lse


def attention_backward(
    problem: AttentionProblem, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor
) -> backward.Gradients:
    """The gradients of a problem that :func:`attention` has run, from its device's backend if that ran it and has a backward
    of its own."""
    backend = backend_for(out)
    supported = problem.plan((backend.NAME, "support"), backend.supports).ok
    run = getattr(backend, "backward", backward.backward) if supported else backward.backward
    return cast(backward.Gradients, run(problem, out, lse, d_out, d_lse))


def kv_write(write: CacheWrite) -> None:
    """Validate a write and run it on its device's backend. Every backend supports every write."""
    k_cache, v_cache, k_descale, v_descale, *_ = write.tensors
    assert k_cache is not None
    backend, entry = backend_for(k_cache), write.entry
    if entry is None or entry.ready_for is not backend:
        validate_write(write, backend.CAPABILITIES)
        if entry is not None:
            entry.ready_for = backend
    if not backend.CAPABILITIES.checks_values and values_wanted(k_cache):
        check_write_values(write)
    has_scales = k_descale is not None or v_descale is not None
    if k_descale is not None and v_descale is not None:
        validate_scales(k_cache, v_cache, k_descale, v_descale, appends=True)  # type: ignore[arg-type]
    if has_scales and values_wanted(k_cache):
        check_new_tokens(write.tensors)
    if _counters:
        _count(CallKind("write", backend.NAME, k_cache.device.type))
    backend.kv_write(write)
    _bump_versions(_written(write.tensors) if has_scales else (k_cache, v_cache))  # type: ignore[arg-type]


def backend_for(tensor: Tensor) -> Backend:
    """The backend that runs problems on the device of ``tensor``."""
    name = _forced.current
    if name is not None:
        return _usable(name)
    device = tensor.device
    return _of_device.get(device) or _find_for_device(device)


def use_backend(name: str) -> AbstractContextManager[None]:
    """Run every call inside on backend ``name`` (``"reference"``, ``"cpu"``, ``"metal"``, ``"triton"``), on any device.

    For tests, comparisons and simulators. Holds in this thread, and in threads that force no backend themselves. What the
    backend does not support still goes to the reference, with a warning.

    Raises:
        ValueError: there is no such backend.

    Examples:
        >>> from pagedflash import flash_attn_func
        >>> q, k, v = torch.randn(3, 1, 5, 8, 64)
        >>> with use_backend("reference"):
        ...     out = flash_attn_func(q, k, v)
    """
    if name not in BACKEND_MODULES:
        raise ValueError(f"pagedflash: backend is {name!r}, expected one of {', '.join(BACKEND_MODULES)}")
    return _forced.use(name)


@contextmanager
def count_calls() -> Iterator[Counter[CallKind]]:
    """Count the attention calls and cache writes made inside, in all threads, by layout, backend and device.

    Examples:
        >>> from pagedflash import flash_attn_func
        >>> q, k, v = torch.randn(3, 1, 5, 8, 64)
        >>> with use_backend("reference"), count_calls() as calls:
        ...     out = flash_attn_func(q, k, v)
        >>> calls[CallKind("dense", "reference", "cpu")]
        1
    """
    counter: Counter[CallKind] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters[:] = [other for other in _counters if other is not counter]


def availability() -> dict[str, Support]:
    """Backend -> (available here, the reason if not).

    Examples:
        >>> availability()["reference"]
        Support(ok=True, reason='')
    """
    return {name: _load(name)[1] for name in BACKEND_MODULES}


def _written(tensors: Tensors) -> list[Tensor]:
    """What a write with these tensors writes to."""
    k, v, *descales = tensors[:4]
    return [k, v, *filter(is_per_token, descales)]  # type: ignore[list-item]


def _count(kind: CallKind) -> None:
    for counter in _counters:
        counter[kind] += 1


_of_device: dict[torch.device, Backend] = {}
"""Device -> its backend, once that has been found available."""


def _find_for_device(device: torch.device) -> Backend:
    name = DEVICE_BACKENDS.get(device.type)
    if name is None:
        _warn_once(device.type, f"no backend is written for {device.type} devices")
        return reference
    backend = _usable(name)
    if name == backend.NAME:
        _of_device[device] = backend
    return backend


def _usable(name: str) -> Backend:
    backend, support = _load(name)
    if backend is None or not support.ok:
        _warn_once(name, support.reason)
        return reference
    return backend


def _load(name: str) -> tuple[Backend | None, Support]:
    backend, reason = _import(name)
    # Asked every time: metal.use_compiler makes a backend available for a while.
    return (backend, backend.available()) if backend is not None else (None, Support(False, reason))


@cache
def _import(name: str) -> tuple[Backend | None, str]:
    try:
        backend = import_module(BACKEND_MODULES[name], __package__)
    except ImportError as error:
        return None, f"it cannot be imported: {error}"
    return cast(Backend, backend), ""


@cache
def _warn_once(name: str, reason: str) -> None:
    warnings.warn(f"pagedflash: the slow reference runs instead of {name}: {reason}", RuntimeWarning, stacklevel=2)


def _reader_of(variable: str) -> Callable[[], bool]:
    """Whether an environment variable is 1. os.environ itself takes a microsecond to find that there is none."""
    environ: Any = os.environ
    try:
        get, name, one = environ._data.get, environ.encodekey(variable), environ.encodevalue("1")
    except AttributeError:
        get, name, one = environ.get, variable, "1"
    return lambda: bool(get(name) == one)


_check_is_on = _reader_of(CHECK_VARIABLE)


def values_wanted(tensor: Tensor) -> bool:
    """Whether lengths and tables are checked on the device of ``tensor``."""
    return tensor.is_cpu or _check_is_on()
