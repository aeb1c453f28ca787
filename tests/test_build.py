"""The build: which compiler it finds, and what it refuses."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def build_backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/build_backend.py, with nothing behind it."""
    scikit = ModuleType("scikit_build_core.build")
    hooks: Any = lambda *arguments: ["scikit's own"]  # noqa: E731
    for name in ("build_sdist", "get_requires_for_build_sdist", "get_requires_for_build_wheel"):
        setattr(scikit, name, hooks)
    parent = ModuleType("scikit_build_core")
    parent.build = scikit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "scikit_build_core", parent)
    monkeypatch.setitem(sys.modules, "scikit_build_core.build", scikit)
    monkeypatch.delenv("CXX", raising=False)
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "tools/build_backend.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.platform == "win32", reason="scripts of a shell")
@pytest.mark.parametrize("status, needs", ((0, ["scikit's own"]), (1, ["scikit's own", "ziglang>=0.13"])))
def test_zig_is_the_compiler_where_no_other_works(
    build_backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, needs: list[str]
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\nexit {status}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build_backend.get_requires_for_build_wheel() == needs
    monkeypatch.setenv("CXX", "mine")
    assert build_backend.get_requires_for_build_wheel() == ["scikit's own"]


@pytest.mark.parametrize("installed", (True, False))
def test_the_stub_of_a_mac_is_not_run(build_backend: ModuleType, monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    """It would open a dialog."""

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        assert command == ["xcode-select", "--print-path"]
        return SimpleNamespace(returncode=0 if installed else 2)

    monkeypatch.setattr(build_backend, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(build_backend, "shutil", SimpleNamespace(which=lambda name: f"/usr/bin/{name}"))
    monkeypatch.setattr(build_backend, "subprocess", SimpleNamespace(run=run))
    assert build_backend._has_compiler() == installed


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_a_universal_build_is_refused(tmp_path: Path) -> None:
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DCMAKE_OSX_ARCHITECTURES=x86_64;arm64"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode and "build for one architecture at a time" in " ".join(done.stderr.split())
