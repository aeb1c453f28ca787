"""What this machine has, and what to do about what it lacks: the facts that ``pagedflash doctor`` prints."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import warnings
from typing import Any, NamedTuple

import torch
from torch.torch_version import TorchVersion

from .. import signature
from ..backends.cpu.launch import ISA_VARIABLE, library
from ..backends.metal.tuning import SWEEP, gpu_name, tuning_in_force
from ..dispatch import DEVICE_BACKENDS, availability
from .measure import apple_chip

OLDEST_MACOS = 14
TORCH_FOR_MPS = "2.14.1"


class BackendState(NamedTuple):
    name: str
    devices: str  # device types it is written for
    available: bool
    remark: str  # why not, or what of it


class FastPath(NamedTuple):
    """Whether continuous batching decodes through block tables once ``pagedflash.transformers.enable()`` was called."""

    open: bool
    remark: str  # what to do if not


NO_NATIVE_SIGNATURES = "; without its native signatures (every call takes some microseconds longer): reinstall it"


def versions() -> dict[str, str]:
    """Software -> version, or what its absence means."""
    return {
        "pagedflash": _version("pagedflash", "run from its source") + ("" if signature.native else NO_NATIVE_SIGNATURES),
        "Python": f"{platform.python_version()} on {_system()} {platform.machine()}",
        "torch": _torch_version(),
        "transformers": _version("transformers", "not installed: pip install 'pagedflash[transformers]'"),
        "kernels": _version("kernels", "not installed; only kernels from the Hub need it, pagedflash does not"),
    }


def devices() -> dict[str, str]:
    """Device -> what it is. Every device of this machine that torch can use."""
    capability = torch.backends.cpu.get_cpu_capability()
    found = {"cpu": f"{apple_chip() or platform.machine()}, {capability}, {torch.get_num_threads()} threads"}
    if torch.backends.mps.is_available():
        found["mps"] = gpu_name()
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        for index in range(module.device_count() if module.is_available() else 0):
            found[f"{kind}:{index}"] = module.get_device_name(index)
    return found


def backends() -> list[BackendState]:
    """Every backend, in the order of the devices they are written for; the reference last, since it runs on any."""
    here = {device.partition(":")[0] for device in devices()}
    states = []
    for name, (available, reason) in availability().items():
        served = [device for device, backend in DEVICE_BACKENDS.items() if backend == name]
        if name == "reference":
            states.append(BackendState(name, "any", available, "slow; runs where nothing else does"))
        elif not here.intersection(served):
            remark = _why_no_mps() if "mps" in served else ""
            states.append(BackendState(name, ", ".join(served), False, remark or "no such device here"))
        else:
            remark = _instruction_sets() if name == "cpu" and available else reason
            states.append(BackendState(name, ", ".join(served), available, remark))
    return sorted(states, key=lambda state: state.name == "reference")


def healthy() -> bool:
    """Whether every device here that a backend is written for has it."""
    here = {device.partition(":")[0] for device in devices()}
    available = {state.name for state in backends() if state.available}
    return all(DEVICE_BACKENDS[device] in available for device in here if device in DEVICE_BACKENDS)


def report() -> dict[str, Any]:
    """Everything, for ``--json`` and bug reports."""
    return {
        "healthy": healthy(),
        "versions": versions(),
        "devices": devices(),
        "backends": [state._asdict() for state in backends()],
        "metal_tuning": metal_tuning(),
        "decode_fast_path": decode_fast_path()._asdict(),
    }


def _instruction_sets() -> str:
    """What the CPU kernels run with, and what else they could."""
    native = library()
    names = {number: name for name, number in native.isas.items()}
    others = [name for name, number in native.isas.items() if number != native.isa]
    return f"runs {names[native.isa]}; {ISA_VARIABLE} takes {', '.join(others)} too"


def _why_no_mps() -> str:
    """What keeps PyTorch from this Mac's GPU; empty on other machines."""
    if sys.platform != "darwin":
        return ""
    if platform.machine() != "arm64":
        return "an Intel Mac, or an Intel Python on Apple silicon: install an arm64 Python"
    if not torch.backends.mps.is_built():
        return "this build of torch has no MPS: pip install --force-reinstall torch"
    release = platform.mac_ver()[0]
    if int(release.partition(".")[0] or 0) < OLDEST_MACOS:
        return f"macOS {release} is too old, torch needs macOS {OLDEST_MACOS} or newer: update macOS"
    return "torch finds no MPS device: is this a virtual machine without a GPU?"


def metal_tuning() -> tuple[str, str] | None:
    """The tiling in force on this machine's Apple GPU, and where it comes from; None if there is no such GPU."""
    if not gpu_name():
        return None
    try:
        tuning, source = tuning_in_force()
    except ValueError as error:
        return "none", str(error)
    if not source:
        return "defaults", f"not tuned for this GPU: {SWEEP} does that, once"
    return str(tuning) or "defaults", f"from {source}"


def decode_fast_path() -> FastPath:
    """Ask transformers, with pagedflash enabled for the time of the question."""
    from .. import transformers as integration
    from ..integrations.transformers import engine, hooks

    already_enabled = integration.is_enabled()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            integration.enable()
        if integration.decode_fast_path_is_open():
            limit = "" if hooks.version_numbers() >= engine.FIRST_VERSION else ", for models without sliding windows"
            return FastPath(True, f"pagedflash.transformers.enable() opens it{limit}")
        return FastPath(False, "install transformers 5.17 to 5.24; with this one decoding goes through varlen")
    except ImportError:
        return FastPath(False, "pip install 'pagedflash[transformers]'")
    except RuntimeError as error:
        return FastPath(False, str(error))
    finally:
        if not already_enabled:
            integration.disable()


def _system() -> str:
    return f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.system()


def _torch_version() -> str:
    if sys.platform == "darwin" and torch.__version__ < TorchVersion(TORCH_FOR_MPS):
        return f"{torch.__version__}; on MPS it is slow and memory-hungry: pip install 'torch>={TORCH_FOR_MPS}'"
    return torch.__version__


def _version(distribution: str, otherwise: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return otherwise
