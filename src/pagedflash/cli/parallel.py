"""``--tp N``: one model over N processes of this machine, each with a part of every layer (tensor parallelism).

A command that takes ``--tp`` runs itself once more in every process, a *rank*. Rank 0 has the terminal, the others are
silent: nothing is printed twice.

>>> if tp > 1 and not parallel.in_a_rank():
...     sys.exit(parallel.run_ranks(tp, device))
>>> model = AutoModelForCausalLM.from_pretrained(..., **parallel.loading_options(tp))

``torchrun`` starts processes too, but when one fails it kills the others, often before rank 0 could say why, and prints a
table of tracebacks. Here all have a moment to end by themselves, and the sentence of the first that failed is left.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click
import torch

from .generate import INTERRUPTED, GenerateError

GRACE = 10.0
"""Seconds that the other ranks have to end by themselves after one has ended."""

POLL = 0.05

ERROR_FILE = "PAGEDFLASH_ERROR_FILE"
"""The variable that names the file where a rank leaves the sentence it fails with."""

_STDERR = ".stderr"


def in_a_rank() -> bool:
    """Whether this process is one of several, started by :func:`run_ranks` or by torchrun."""
    return "RANK" in os.environ


def loading_options(ranks: int) -> dict[str, Any]:
    """What ``from_pretrained`` needs to split a model over ``ranks`` processes.

    Raises:
        GenerateError: so many processes are not running.
    """
    if ranks == 1:
        return {}
    running = int(os.environ.get("WORLD_SIZE", 1))
    if running != ranks:
        raise GenerateError(f"--tp {ranks} was given to {running} processes; give --tp {running}")
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=ranks)}


def run_ranks(ranks: int, device: torch.device, command: Sequence[str] | None = None) -> int:
    """Run a command in ``ranks`` processes of this machine, and wait for all of them.

    An interrupt (Ctrl-C) is sent on to every rank, once, for each to end as the command does; a second one kills them.

    Args:
        ranks: how many, each on a GPU of its own if ``device`` is one.
        device: what they run on.
        command: by default ``pagedflash`` with the arguments of this process.

    Returns:
        The exit code of rank 0.

    Raises:
        GenerateError: this machine cannot run so many ranks, or one failed: the sentence of the first that did.
    """
    environment = {**os.environ, **_environment(ranks, device)}
    command = command or [sys.executable, "-m", "pagedflash", *sys.argv[1:]]
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as directory, _kill_is_interrupt():
        files = [Path(directory, str(rank)) for rank in range(ranks)]
        try:
            for rank, file in enumerate(files):
                processes.append(_start(command, {**environment, ERROR_FILE: str(file)}, rank))
            first = _first_to_fail(processes)
        except KeyboardInterrupt:
            return _interrupt(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        rank = first or 0
        code = processes[rank].returncode
        if code and (sentence := _sentence(files[rank])):
            raise GenerateError(sentence)
        if code < 0:
            raise GenerateError(f"rank {rank} was ended by signal {-code}")
        return code


def fail(error: Exception) -> NoReturn:
    """End the command with a sentence. In a rank it is left for :func:`run_ranks`, which says it once for all."""
    if file := os.environ.get(ERROR_FILE):
        Path(file).write_text(str(error))
        sys.exit(1)
    raise click.ClickException(str(error)) from error


def leave() -> None:
    """What a rank does at its end."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _environment(ranks: int, device: torch.device) -> dict[str, str]:
    """What torch.distributed and transformers read in every rank.

    Raises:
        GenerateError: not on this device, or not so many.
    """
    if device.type not in ("cpu", "cuda"):
        raise GenerateError(f"--tp runs on cuda and cpu, not on {device.type}: transformers splits no model there")
    if device.index is not None:
        raise GenerateError(f"--tp takes a GPU for each rank; give --device {device.type} without a number")
    if device.type == "cuda" and torch.cuda.device_count() < ranks:
        raise GenerateError(f"--tp {ranks} needs {ranks} GPUs, and this machine has {torch.cuda.device_count()}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // ranks))
    if device.type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # transformers takes the GPUs where it sees some
    else:
        environment["NCCL_GRAPH_MIXING_SUPPORT"] = "0"  # continuous batching wants it so before NCCL starts
    return environment


def _start(command: Sequence[str], environment: dict[str, str], rank: int) -> subprocess.Popen[bytes]:
    """One rank, in a session of its own: a terminal's Ctrl-C reaches :func:`run_ranks` alone, which sends it on once."""
    environment = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    if rank == 0:
        return subprocess.Popen(command, env=environment, start_new_session=True)
    with open(environment[ERROR_FILE] + _STDERR, "wb") as errors:
        return subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )


def _first_to_fail(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all ranks have ended, or :data:`GRACE` after the first has."""
    first, end = None, float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        time.sleep(POLL)
        codes = [process.poll() for process in processes]
        if first is None:
            first = next((rank for rank, code in enumerate(codes) if code), None)
        if end == float("inf") and codes != [None] * len(codes):
            end = time.monotonic() + GRACE
    return first


def _interrupt(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Interrupt all ranks and wait for them. Returns the exit code of rank 0."""
    try:
        for process in processes:
            process.send_signal(signal.SIGINT)
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        return INTERRUPTED
    return max(processes[0].returncode, 0) or INTERRUPTED


@contextmanager
def _kill_is_interrupt() -> Iterator[None]:
    """A plain kill of this process ends the ranks too."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _sentence(file: Path) -> str:
    """What a rank has left for :func:`fail`, or else the last line of its error output, where a traceback has the error."""
    if file.exists():
        return file.read_text()
    errors = Path(str(file) + _STDERR)
    lines = errors.read_text(errors="replace").split("\n") if errors.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
