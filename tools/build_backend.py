"""The build backend: scikit-build-core, with zig as the C++ compiler where the machine has no other.

``pip install .`` must work on a machine without a compiler. There the ``ziglang`` wheel (a whole clang) becomes a build
requirement, and CMake is told to use it. Where a compiler works, or ``CXX`` names one, nothing is added.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scikit_build_core import build as _scikit
from scikit_build_core.build import build_sdist, get_requires_for_build_sdist  # noqa: F401  (hooks pip looks up)

_ZIG = "ziglang>=0.13"
_COMPILERS = ("c++", "g++", "clang++")

Settings = dict[str, Any] | None


def _has_compiler() -> bool:
    return bool(os.environ.get("CXX")) or any(map(_works, _COMPILERS))


def _works(compiler: str) -> bool:
    path = shutil.which(compiler)
    if path is None:
        return False
    command = [path, "--version"]
    if sys.platform == "darwin" and path == f"/usr/bin/{compiler}":
        # Without the Command Line Tools this is a stub, which opens a dialog when it runs. xcode-select knows.
        command = ["xcode-select", "--print-path"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    requires = _scikit.get_requires_for_build_wheel(config_settings)
    return requires if _has_compiler() else [*requires, _ZIG]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    requires = _scikit.get_requires_for_build_editable(config_settings)
    return requires if _has_compiler() else [*requires, _ZIG]


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    with _CompilerFound():
        return _scikit.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    with _CompilerFound():
        return _scikit.build_editable(wheel_directory, config_settings, metadata_directory)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    return _scikit.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Settings = None) -> str:
    return _scikit.prepare_metadata_for_build_editable(metadata_directory, config_settings)


class _CompilerFound:
    """Inside, ``CC`` and ``CXX`` name zig if the machine has no compiler of its own."""

    def __enter__(self) -> None:
        self.directory: Path | None = None
        if _has_compiler():
            return
        self.directory = Path(tempfile.mkdtemp(prefix="pagedflash-zig-"))
        for variable, command in (("CC", "cc"), ("CXX", "c++"), ("AR", "ar"), ("RANLIB", "ranlib")):
            os.environ[variable] = str(_zig_script(self.directory, command))

    def __exit__(self, *error: object) -> None:
        if self.directory is not None:
            for variable in ("CC", "CXX", "AR", "RANLIB"):
                del os.environ[variable]
            shutil.rmtree(self.directory)


def _zig_script(directory: Path, command: str) -> Path:
    """An executable that is ``zig <command>``: CMake wants a compiler of one word."""
    script = directory / f"zig-{command}"
    if os.name == "nt":
        script = script.with_suffix(".cmd")
        script.write_text(f'@"{sys.executable}" -m ziglang {command} %*\n')
    else:
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ziglang {command} "$@"\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script
