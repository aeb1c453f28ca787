"""Write pagedflash as a Python-only kernel for the Hugging Face ``kernels`` library.

::

    DIR/build/torch-cpu/      __init__.py  metadata.json  interface.py ...  backends/cpu/
        build/torch-cuda/     the same with backends/triton/
        build/torch-metal/    the same with backends/metal/

Each variant is this package without what a kernel does not need. It loads from any path, for every torch version, and beside
an installed pagedflash: imports are relative, and the operators are named after the module, which the ``kernels`` library
names after the ``id`` in metadata.json.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
KERNEL_NAME = "pagedflash"
KERNEL_VERSION = 1

VARIANTS = {"cpu": "cpu", "cuda": "triton", "metal": "metal"}
"""Backend type as the ``kernels`` library names it -> our backend for it. The variant is called ``torch-`` and the type."""

MODULES = (
    "arguments.py",
    "bert_padding.py",
    "dispatch.py",
    "errors.py",
    "geometry.py",
    "interface.py",
    "ops.py",
    "plan_cache.py",
    "problem.py",
    "qkvpacked.py",
    "scoped.py",
    "signature.py",
    "validate.py",
    "validate_values.py",
    "backends/__init__.py",
    "backends/allocation.py",
    "backends/backward.py",
    "backends/dropout.py",
    "backends/protocol.py",
    "backends/reference.py",
    "integrations/__init__.py",
    "integrations/metal_flash_sdpa.py",
)
NOT_PART_OF_A_KERNEL = ("native", "__pycache__")  # sources that are compiled before, and Python's own cache

MORE_EXPORTS = """
from .integrations.metal_flash_sdpa import flash_attention_varlen

__all__ += ["flash_attention_varlen"]
"""

METADATA = "metadata.json"


class HubError(Exception):
    """What the user can do something about, in one sentence."""


def write(directory: Path) -> list[Path]:
    """Write the kernel tree below ``directory``, which is created, over one that was written before.

    The CPU variant takes along the native library if it is built; it serves machines like this one, others fall back to the
    reference, with a warning.

    Returns:
        The folders of the variants.

    Raises:
        HubError: ``directory`` is a file, or holds variants of another kernel.
    """
    if directory.exists() and not directory.is_dir():
        raise HubError(f"{directory} is not a directory")
    folders = {kind: directory / "build" / f"torch-{kind}" for kind in VARIANTS}
    for folder in folders.values():
        if folder.exists() and not _is_ours(folder):
            raise HubError(f"{folder} exists and is not a pagedflash kernel; give another directory")
    for kind, folder in folders.items():
        shutil.rmtree(folder, ignore_errors=True)
        _write_variant(folder, kind)
    return list(folders.values())


def _write_variant(folder: Path, kind: str) -> None:
    for name in MODULES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACKAGE / name, folder / name)
    backend = f"backends/{VARIANTS[kind]}"
    shutil.copytree(PACKAGE / backend, folder / backend, ignore=shutil.ignore_patterns(*NOT_PART_OF_A_KERNEL))
    (folder / "__init__.py").write_text((PACKAGE / "__init__.py").read_text() + MORE_EXPORTS)

    files = digests(folder)
    content = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]
    metadata = {
        "id": f"_{KERNEL_NAME}_{kind}_{content}",
        "name": KERNEL_NAME,
        "version": KERNEL_VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": kind},
        "digest": {"algorithm": "sha256", "files": files},
    }
    (folder / METADATA).write_text(json.dumps(metadata, indent=2) + "\n")


def digests(folder: Path) -> dict[str, str]:
    """Every file of a variant but its metadata -> its SHA-256 in base64, as the ``kernels`` library computes them."""
    return {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != METADATA
    }


def _is_ours(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / METADATA).read_text())["name"] == KERNEL_NAME)
    except (OSError, ValueError, KeyError, TypeError):
        return False
