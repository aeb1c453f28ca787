"""The numbers of the tiling that one GPU may want otherwise than another, and where those in force come from.

From the environment variable ``PAGEDFLASH_METAL_TUNING`` if it is set; else what ``pagedflash bench --device mps --sweep``
has stored for this GPU; else the defaults.
"""

from __future__ import annotations

import json
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

VARIABLE = "PAGEDFLASH_METAL_TUNING"
"""Numbers of :class:`Tuning` to use, as ``"load_registers=16,decode_simdgroups=8"``; what is not named has its default."""

SWEEP = "pagedflash bench --device mps --sweep"


class Tuning(NamedTuple):
    """Numbers of the tiling. ``str`` names those that are not the default, as :meth:`parse` reads them."""

    load_registers: int = 16  # of a lane, for the loads of decode that are in flight together
    lane_rows: int = 4  # query heads a KV head, at most, whose single queries decode multiplies over lanes, not as matrices
    decode_rows: int = (
        16  # of a threadgroup of decode, at most: 8 or 16, which reads the keys less often and takes more registers
    )
    decode_simdgroups: int = 4  # of a threadgroup of decode
    simdgroups_per_core: int = 46  # to plan decode for; a core has registers for 13, and more that are shorter end together
    prefill_simdgroups: int = 4  # of a threadgroup of prefill
    prefill_registers: int = 64  # of a lane, at most, for Q and the output accumulator of prefill
    prefill_keys: int = 32  # of a tile of prefill, where threadgroup memory has room; half of it from head dim 128 on

    def __str__(self) -> str:
        return ",".join(f"{name}={value}" for name, value in self._asdict().items() if value != self._field_defaults[name])

    @staticmethod
    def parse(text: str, source: str = VARIABLE) -> Tuning:
        """From ``"name=number,name=number"``; what is not named has its default.

        Raises:
            ValueError: a name or a number is none; the message begins with ``source``.
        """
        numbers = {}
        for item in filter(None, text.split(",")):
            name, _, number = item.partition("=")
            if name.strip() not in Tuning._fields or not number.strip().isdecimal() or not int(number):
                expected = f"name=number,... with names of {', '.join(Tuning._fields)} and numbers from 1 on"
                raise ValueError(f"pagedflash: {source} has {item!r}, expected {expected}")
            numbers[name.strip()] = int(number)
        return Tuning(**numbers)


class TuningInForce(NamedTuple):
    tuning: Tuning
    source: str  # VARIABLE, the file, or "" for the defaults


def gpu_name() -> str:
    """As its tuning is stored: Macs of one name differ in cores. Empty where there is no Apple GPU."""
    if not torch.backends.mps.is_available():
        return ""
    return f"{torch.backends.mps.get_name()}, {torch.backends.mps.get_core_count()} cores"


def tuning_file() -> Path:
    """JSON: name of a GPU -> its tuning, as :meth:`Tuning.parse` reads it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pagedflash" / "metal-tuning.json"


@lru_cache(maxsize=1)
def tuning_in_force() -> TuningInForce:
    """Read once in a process.

    Raises:
        ValueError: the environment variable has no tuning. A file that has none only gives a warning: a newer pagedflash
            may have other numbers.
    """
    if VARIABLE in os.environ:
        return TuningInForce(Tuning.parse(os.environ[VARIABLE]), VARIABLE)
    name, file = gpu_name(), tuning_file()
    if not name or not file.exists():
        return TuningInForce(Tuning(), "")
    try:
        stored = dict(json.loads(file.read_text()))
        if name in stored:
            return TuningInForce(Tuning.parse(stored[name], str(file)), str(file))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(
            f"pagedflash: the Metal kernels run with their default tuning, since {file} cannot be used ({error});"
            f" run {SWEEP!r} to write it anew",
            RuntimeWarning,
            stacklevel=2,
        )
    return TuningInForce(Tuning(), "")


def store_tuning(tuning: Tuning) -> Path:
    """Use ``tuning`` on this GPU from now on, in this process and later ones. Other GPUs keep theirs.

    Returns:
        The file it is in.
    """
    file = tuning_file()
    try:
        stored = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):  # none yet, or one that cannot be used
        stored = {}
    stored[gpu_name()] = str(tuning)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(stored, indent=2) + "\n")
    tuning_in_force.cache_clear()
    return file
