"""The compiler and its cache.

A `clang++` on the PATH (or named by METALSIM_CLANG) is used if it is recent enough, else the clang inside the
`ziglang` wheel. What is compiled is kept under METALSIM_CACHE, by default the user's cache folder, by content.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import CompileError, MetalError

PACKAGE = Path(__file__).parent
RUNTIME = PACKAGE / "runtime"
MSL = PACKAGE / "msl"
OLDEST_CLANG = 21

LANGUAGE = ("-x", "c++", "-std=c++17", "-nostdinc", "-fno-exceptions", "-fno-rtti", "-fsigned-char")
# Every operation on half and bfloat rounds, as on the GPU; kernels read one buffer through several types.
CODE = (
    "-fPIC", "-w", "-fno-strict-aliasing", "-fno-stack-protector", "-fno-asynchronous-unwind-tables",
    "-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none",
)  # fmt: skip
# A listing, made as a GPU's compiler would: everything inlined.
INLINED = ("-O2", "-fno-vectorize", "-fno-slp-vectorize", "-mllvm", "-inline-threshold=100000", "-S", "-o", "-")
PROCESSOR = {"x86_64": ("-mavx2", "-mfma", "-mf16c")}


@dataclass(frozen=True)
class Toolchain:
    """How to compile to an object and link it, and a word that names the version."""

    compile: tuple[str, ...]
    link: tuple[str, ...]
    version: str


@functools.cache
def toolchain() -> Toolchain:
    """The clang to use.

    Raises:
        MetalError: there is neither a recent clang nor the ziglang wheel, or this is not Linux.
    """
    if sys.platform != "linux":
        raise MetalError("metalsim runs on Linux; on a Mac, use torch.mps.compile_shader")
    named = os.environ.get("METALSIM_CLANG") or shutil.which("clang++")
    if named:
        version = subprocess.run([named, "--version"], capture_output=True, text=True, check=True).stdout
        number = re.search(r"clang version (\d+)", version)
        if number and int(number.group(1)) >= OLDEST_CLANG:
            return Toolchain((named,), (named, "-shared", "-nostdlib"), version)
        if "METALSIM_CLANG" in os.environ:
            raise MetalError(f"METALSIM_CLANG is not clang {OLDEST_CLANG} or newer: {version.splitlines()[0]}")
    try:
        import ziglang
    except ImportError:
        raise MetalError(f"metalsim needs clang {OLDEST_CLANG} or newer: install the ziglang wheel or a clang") from None
    zig = str(Path(ziglang.__file__).parent / "zig")
    version = subprocess.run([zig, "clang", "--version"], capture_output=True, text=True, check=True).stdout
    target = f"{platform.machine()}-linux-gnu"
    return Toolchain((zig, "clang", "-target", target), (zig, "ld.lld", "-shared"), version)


def run_clang(arguments: Sequence[str | Path], source: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run clang with `source` as its input."""
    command = [*toolchain().compile, *map(str, arguments)]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=False)


def preprocess(source: str) -> str:
    """Metal source with its macros expanded and the <metal_*> headers left out."""
    done = run_clang(
        [*LANGUAGE, "-E", "-undef", "-D__METAL__=1", "-D__METAL_VERSION__=310", "-D__METAL_MACOS__=1",
         "-I", MSL / "headers", "-"], source,
    )  # fmt: skip
    if done.returncode:
        raise CompileError(readable(done.stderr))
    return done.stdout


def readable(diagnostics: str) -> str:
    """Clang's messages with the source called by what it is."""
    return diagnostics.replace("<stdin>", "program.metal").strip()


def build_shared_object(source: str, options: Sequence[str], output: Path) -> None:
    """Compile C++ to a shared object."""
    processor = PROCESSOR.get(platform.machine(), ())
    obj = output.with_suffix(".o")
    done = run_clang([*LANGUAGE, *CODE, *processor, *options, "-c", "-o", obj, "-"], source)
    if done.returncode:
        raise CompileError(readable(done.stderr))
    linked = subprocess.run([*toolchain().link, "-o", str(output), str(obj)], capture_output=True, text=True, check=False)
    if linked.returncode:
        raise CompileError(linked.stderr)
    obj.unlink()


# What compiled objects of each kind depend on besides their source and the compiler.
_PARTS = {
    "runtime": ("toolchain.py", "launch.py", "runtime/*"),
    "library": (
        "toolchain.py",
        "library.py",
        "t*.py",
        "rejections.py",
        "stack.py",
        "registers.py",
        "msl/*.h",
        "msl/headers/*",
        "runtime/api.h",
    ),
}


@functools.cache
def _fingerprint(kind: str) -> bytes:
    digest = hashlib.sha256(toolchain().version.encode())
    for path in sorted({p for pattern in _PARTS[kind] for p in PACKAGE.glob(pattern) if p.is_file()}):
        digest.update(path.read_bytes())
    return digest.digest()


def cache_folder() -> Path:
    """Where compiled objects are kept."""
    if named := os.environ.get("METALSIM_CACHE"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "metalsim"


def cached(kind: str, content: str, build: Callable[[Path], None]) -> Path:
    """The folder that `build` filled for this content, now or in an earlier run; `kind` is a key of _PARTS.

    Several processes may build one entry at once: each works in a folder of its own and the first to finish wins.
    """
    digest = hashlib.sha256(_fingerprint(kind) + content.encode()).hexdigest()[:40]
    folder = cache_folder() / digest[:2] / digest[2:]
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix="building-", dir=folder.parent))
    try:
        build(working)
        try:
            working.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return folder
