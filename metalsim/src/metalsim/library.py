"""`compile_shader`: Metal source to a library of kernels that run here."""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import CompileError
from .launch import MAX_THREADS, BoundKernel, launch, runtime
from .rejections import reject
from .settings import current
from .toolchain import MSL, build_shared_object, cached, preprocess
from .translate import translate

_UNCHECKED = ("-O2", "-fvisibility=hidden")
# Every load and store calls the runtime, as the source writes it: nothing is vectorised or combined, and the n-th turn
# of a loop is at the same place in the code for every lane.
_CHECKED = (
    "-O2", "-fvisibility=hidden", "-gline-tables-only", "-fno-vectorize", "-fno-slp-vectorize",
    "-fsanitize=kernel-address",
    *(word for option in (
        "asan-instrumentation-with-call-threshold=0", "asan-stack=0", "asan-globals=0",
        "asan-kernel-mem-intrinsic-prefix=1", "asan-instrument-atomics=0", "disable-vector-combine",
        "unroll-runtime=0", "unroll-allow-remainder=0", "unroll-allow-peeling=0",
    ) for word in ("-mllvm", f"-{option}")),
)  # fmt: skip


def compile_shader(source: str) -> Library:
    """Compile Metal source; the interface of `torch.mps.compile_shader`.

    Args:
        source: one Metal file. Its kernels become attributes of the library, by their host names.

    Raises:
        CompileError: the source does not compile here, or Apple's compiler would reject it.
    """
    return Library(source)


class Library:
    """The kernels of one source."""

    def __init__(self, source: str) -> None:
        for number, line in enumerate(source.splitlines(), 1):
            if not line.isascii():
                raise CompileError(f"line {number}: a character that is not ASCII; PyTorch passes sources on as ASCII")
        self._source = source
        self._kernels: dict[str, Kernel] = {}
        self._program(current().check)

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("__") or name not in self._program(current().check):
            raise AttributeError(f"no kernel named {name!r}; there are {', '.join(dir(self))}")
        return self._kernels.setdefault(name, Kernel(self, name))

    def __dir__(self) -> list[str]:
        return sorted(self._program(current().check))

    @functools.lru_cache(maxsize=2)  # noqa: B019  (a library lives as long as its process)
    def _program(self, checked: bool) -> dict[str, BoundKernel]:
        """The kernels as compiled for unchecked or checked runs."""
        runtime()
        # Once for both kinds: an empty folder says that the source is legal.
        cached("library", f"legal\n{self._source}", lambda folder: reject(preprocess(self._source)))
        content = f"{checked=}\n{self._source}"
        return _load(cached("library", content, functools.partial(_build, self._source, checked)))


class Kernel:
    """A kernel of a library; call it to run it."""

    max_threads_per_threadgroup = MAX_THREADS
    thread_execution_width = 32

    def __init__(self, library: Library, name: str) -> None:
        self._library = library
        self._name = name

    def __call__(
        self,
        *args: Any,
        threads: int | Sequence[int] | None = None,
        group_size: int | Sequence[int] | None = None,
        arg_casts: str | dict[int, str] | None = None,
    ) -> None:
        """Run the kernel over `threads` threads in threadgroups of `group_size`.

        Args:
            args: argument i binds to `[[buffer(i)]]`. CPU tensors bind from their storage offset on; ints go as
                int64, floats as float32, lists of numbers packed; None is rejected.
            threads: the whole grid in threads, one to three dimensions; by default the first tensor's numel.
            group_size: threads of a threadgroup, at most 1024.
            arg_casts: a type ("int32", "fp16", ...) for all numbers, or one for each argument index.

        Raises:
            LaunchError: arguments or sizes that Metal or torch would reject.
            KernelError: what the kernel did wrong.
        """
        simulation = current()
        kernel = self._library._program(simulation.check)[self._name]
        launch(kernel, args, threads, group_size, arg_casts, simulation)


def _build(source: str, checked: bool, folder: Path) -> None:
    preprocessed = preprocess(source)
    translation = translate(preprocessed)
    headers = ("prelude.h", "checked.h") if checked else ("prelude.h",)
    includes = "".join(f'#include "{MSL / header}"\n' for header in headers)
    options = _CHECKED if checked else _UNCHECKED
    build_shared_object(includes + translation.source, options, folder / "library.so")
    entries = [[k.name, k.symbol, [p.name for p in k.parameters]] for k in translation.kernels]
    (folder / "kernels.json").write_text(json.dumps(entries))


def _load(folder: Path) -> dict[str, BoundKernel]:
    library = ctypes.CDLL(str(folder / "library.so"))
    kernels = {}
    for name, symbol, parameters in json.loads((folder / "kernels.json").read_text()):
        indices = (ctypes.c_int * (len(parameters) + 1))()
        library[f"metalsim_buffers_{symbol}"](indices)
        buffers = {p: i for p, i in zip(parameters, indices, strict=False) if i >= 0}
        entry = ctypes.cast(library[f"metalsim_kernel_{symbol}"], ctypes.c_void_p).value
        assert entry is not None
        kernels[name] = BoundKernel(name, folder / "library.so", entry, buffers)
    return kernels
