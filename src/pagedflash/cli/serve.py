"""``pagedflash serve``: transformers' own OpenAI-compatible server, with pagedflash and continuous batching."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from typing import Any

import torch

from .. import transformers as integration
from ..integrations.transformers import hooks
from .generate import GenerateError, ModelFiles, first_line

GRACE = 5
"""Seconds that requests have to end by themselves when the server is told to stop."""


def serve(
    files: ModelFiles,
    device: torch.device,
    dtype: torch.dtype,
    host: str,
    port: int,
    memory: float | None,
    on_ready: Callable[[str], None],
    kv_cache_dtype: str | None = None,
) -> None:
    """Serve one model until SIGINT or SIGTERM; requests under way then have ``GRACE`` seconds.

    Args:
        memory: the part of the free memory that the cache may take; None is transformers' default.
        on_ready: is told the name that requests give as ``model``.
        kv_cache_dtype: as in :func:`pagedflash.transformers.enable`.

    Raises:
        GenerateError: something else listens there, packages are missing, or transformers cannot load the model.
    """
    try:
        socket.create_server((host, port)).close()  # before a model is loaded for nothing
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        raise GenerateError(f"cannot listen on {host}:{port} ({reason}); give another --port or --host") from error
    name = f"{files.source}:{files.gguf_file}" if files.gguf_file else files.source
    try:
        integration.enable(kv_cache_dtype=kv_cache_dtype)
        server = _server(name, device, dtype, host, port, memory)
    except ImportError as error:
        raise GenerateError("the server's packages are missing; run: pip install 'transformers[serving]'") from error
    except Exception as error:  # whatever a loader makes of a broken file
        raise GenerateError(f"transformers cannot load {files.name}: {first_line(error)}") from error
    on_ready(name)
    logging.getLogger("uvicorn.error").addFilter(_not_of_a_cancelled_request)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises both again when it has stopped
    try:
        server.server.run()
    except KeyboardInterrupt:
        pass
    finally:
        _shut_down(server)


def _server(name: str, device: torch.device, dtype: torch.dtype, host: str, port: int, memory: float | None) -> Any:
    """transformers' server, the model loaded, not yet running."""
    from transformers import AutoModelForCausalLM
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    class Models(model_manager.ModelManager):  # type: ignore[misc]  # no types there
        def _validate_args(self) -> None:
            """transformers' server takes no attention but its own."""

        def _load_model(self, repository: str, *args: Any, gguf_file: str | None = None, **options: Any) -> Any:
            """transformers' server asks the configuration for the model's class, and that of a GGUF file does not say it."""
            if gguf_file is None:
                return super()._load_model(repository, *args, **options)
            return AutoModelForCausalLM.from_pretrained(
                repository.partition("@")[0],
                gguf_file=gguf_file,
                dtype=self.dtype,
                device_map=self.device,
                attn_implementation=self.attn_implementation,
            )

        @staticmethod
        def get_gen_models(cache_dir: str | None = None) -> list[dict[str, Any]]:
            """The model that is served; transformers before 5.24 lists the Hub's cache, and fails if there is none."""
            return [{"id": name, "object": "model", "created": 0, "owned_by": ""}]

    class Server(Serve):  # type: ignore[misc]
        def start_server(self) -> None:
            """Not in a thread: uvicorn listens to signals in the main one only."""

    hooks.replace(model_manager, "ModelManager", Models)
    server = Server(
        force_model=name,
        continuous_batching=True,
        attn_implementation=integration.NAME,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        cb_max_memory_percent=memory,
        host=host,
        port=port,
        non_blocking=True,
    )
    server.server.config.timeout_graceful_shutdown = GRACE
    return server


def _not_of_a_cancelled_request(record: logging.LogRecord) -> bool:
    """uvicorn prints the traceback of every request that it cancels after ``GRACE``."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def _shut_down(server: Any) -> None:
    """End the thread that generates, which would keep the process alive for the requests it still has."""
    batching = server._generation_state._cb_manager
    if batching is not None and batching._cb is not None:
        batching._cb.stop(block=True, hard_stop=True)
    server._model_manager.shutdown()
