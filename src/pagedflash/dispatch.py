"""Which backend runs a call: from device and description to one of the modules with the four kernels.

A backend is a module (or object) with ``NAME``, ``available() -> (bool, reason)``, ``supports(call) -> (bool, reason)``,
``attention(call) -> (out, lse)`` and ``kv_write(write)``. Where the device's backend is unavailable or does not support a
call, the reference runs and a warning says why, once for each reason.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import NamedTuple, Protocol

from torch import Tensor

from . import reference
from .call import AttentionCall, CacheWrite, check_values, check_write_values

CHECK_VARIABLE = "PAGEDFLASH_CHECK"
"""Set to 1, this environment variable has lengths and table entries checked on every device, not only on CPUs."""

BACKEND_MODULES = {
    "reference": ".reference",
    "cpu": ".backends.cpu",
    "metal": ".backends.metal",
    "triton": ".backends.triton",
}
DEVICE_BACKENDS = {"cpu": "cpu", "mps": "metal", "cuda": "triton", "xpu": "triton"}
"""Device type -> the backend written for it. Any other device runs the reference."""


class Backend(Protocol):
    """What a backend module offers."""

    NAME: str
    CHECKS_VALUES: bool
    """Whether ``attention`` and ``kv_write`` check lengths and tables themselves before they write."""

    def available(self) -> tuple[bool, str]: ...

    def supports(self, call: AttentionCall) -> tuple[bool, str]: ...

    def attention(self, call: AttentionCall) -> tuple[Tensor, Tensor]: ...

    def kv_write(self, write: CacheWrite) -> None: ...


class CallKind(NamedTuple):
    """What :func:`count_calls` counts by."""

    layout: str  # AttentionCall.layout, or "write" for kv_paged_write
    backend: str
    device: str


_forced: list[str] = []
_counters: list[Counter[CallKind]] = []


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Run a checked call on its backend."""
    backend = _backend_for(call.q.device.type)
    supported, reason = backend.supports(call)
    if not supported:
        _warn_once(backend.NAME, reason)
        backend = _reference()
    if not backend.CHECKS_VALUES and _values_wanted(call.q):
        check_values(call)
    for counter in _counters:
        counter[CallKind(call.layout, backend.NAME, call.q.device.type)] += 1
    return backend.attention(call)


def kv_write(write: CacheWrite) -> None:
    """Run a checked write on its backend. Every backend supports every write."""
    backend = _backend_for(write.k.device.type)
    if not backend.CHECKS_VALUES and _values_wanted(write.k):
        check_write_values(write)
    for counter in _counters:
        counter[CallKind("write", backend.NAME, write.k.device.type)] += 1
    backend.kv_write(write)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every call inside on backend ``name`` (``"reference"``, ``"cpu"``, ``"metal"``, ``"triton"``), on any device.

    For tests, comparisons and simulators. Holds for all threads. What the backend does not support still goes to the
    reference, with a warning.

    Raises:
        ValueError: there is no such backend.
    """
    if name not in BACKEND_MODULES:
        raise ValueError(f"pagedflash: backend is {name!r}, expected one of {', '.join(BACKEND_MODULES)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.remove(name)


@contextmanager
def count_calls() -> Iterator[Counter[CallKind]]:
    """Count the attention calls and cache writes made inside, in all threads, by layout, backend and device.

    >>> with count_calls() as calls:
    ...     model.generate(...)
    >>> calls[CallKind("paged", "cpu", "cpu")]
    """
    counter: Counter[CallKind] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters[:] = [other for other in _counters if other is not counter]


def availability() -> dict[str, tuple[bool, str]]:
    """Backend -> (available here, the reason if not)."""
    return {name: _load(name)[1:] for name in BACKEND_MODULES}


def _backend_for(device_type: str) -> Backend:
    name = _forced[-1] if _forced else DEVICE_BACKENDS.get(device_type)
    if name is None:
        _warn_once(device_type, f"no backend is written for {device_type} devices")
        return _reference()
    backend, is_available, reason = _load(name)
    if backend is None or not is_available:
        _warn_once(name, reason)
        return _reference()
    return backend


def _load(name: str) -> tuple[Backend | None, bool, str]:
    backend, reason = _import(name)
    # Asked every time: metal.use_compiler makes a backend available for a while.
    return (backend, *backend.available()) if backend is not None else (None, False, reason)


@cache
def _import(name: str) -> tuple[Backend | None, str]:
    try:
        backend: Backend = import_module(BACKEND_MODULES[name], __package__)
    except ImportError as error:
        return None, f"it cannot be imported: {error}"
    return backend, ""


def _reference() -> Backend:
    return reference


@cache
def _warn_once(name: str, reason: str) -> None:
    warnings.warn(f"pagedflash: the slow reference runs instead of {name}: {reason}", RuntimeWarning, stacklevel=2)


def _values_wanted(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" or os.environ.get(CHECK_VARIABLE) == "1"
