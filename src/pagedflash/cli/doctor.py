"""What this machine has, and what to do about what it lacks: the facts that ``pagedflash doctor`` prints."""

from __future__ import annotations

import importlib.metadata
import platform
import warnings
from typing import NamedTuple

import torch

from ..dispatch import DEVICE_BACKENDS, availability


class BackendState(NamedTuple):
    name: str
    devices: str  # device types it is written for
    available: bool
    remark: str  # why not, or what of it


class FastPath(NamedTuple):
    """Whether continuous batching decodes through block tables once ``pagedflash.transformers.enable()`` was called."""

    open: bool
    remark: str  # what to do if not


def versions() -> dict[str, str]:
    """Software -> version, or what its absence means."""
    return {
        "pagedflash": _version("pagedflash", "run from its source"),
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "transformers": _version("transformers", "not installed: pip install 'pagedflash[transformers]'"),
        "kernels": _version("kernels", "not installed; only kernels from the Hub need it, pagedflash does not"),
    }


def devices() -> dict[str, str]:
    """Device -> what it is. Every device of this machine that torch can use."""
    capability = torch.backends.cpu.get_cpu_capability()
    found = {"cpu": f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads"}
    if torch.backends.mps.is_available():
        found["mps"] = f"Apple GPU, {torch.backends.mps.get_core_count()} cores"
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
            states.append(BackendState(name, ", ".join(served), False, "no such device here"))
        else:
            states.append(BackendState(name, ", ".join(served), available, reason))
    return sorted(states, key=lambda state: state.name == "reference")


def decode_fast_path() -> FastPath:
    """Ask transformers, with pagedflash enabled for the time of the question."""
    from .. import transformers as integration

    already_enabled = integration.is_enabled()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            integration.enable()
        if integration.decode_fast_path_is_open():
            return FastPath(True, "pagedflash.transformers.enable() opens it, for models without sliding windows")
        return FastPath(False, "install transformers 5.17 to 5.24; with this one decoding goes through varlen")
    except ImportError:
        return FastPath(False, "pip install 'pagedflash[transformers]'")
    except RuntimeError as error:
        return FastPath(False, str(error))
    finally:
        if not already_enabled:
            integration.disable()


def _version(distribution: str, otherwise: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return otherwise
