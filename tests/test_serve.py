"""``pagedflash serve``: transformers' server on pagedflash, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")

import openai
import torch
from click.testing import CliRunner
from models import WORDS, save_model
from transformers import MistralForCausalLM, PreTrainedTokenizerFast

import pagedflash.transformers
from pagedflash.cli import main as cli
from pagedflash.cli import serve

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMPTS = [" ".join(WORDS[i : i + 3 * i]) for i in range(1, 6)]
NEW_TOKENS = 24
START = 120
"""Seconds a server may take to load and answer, on a machine that does other things."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    return str(path)


class Server:
    """The command in a process of its own."""

    def __init__(self, model: str, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.model, self.log = model, log
        self.url = f"http://localhost:{port}"
        command = [sys.executable, "-m", "pagedflash", "serve", model, "--device", "cpu", "--port", str(port)]
        with log.open("w") as output:
            self.process = subprocess.Popen([*command, "--memory", "0.02"], stdout=output, stderr=output)
        end = time.monotonic() + START
        while not self.healthy():
            assert self.process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)

    def healthy(self) -> bool:
        try:
            return bool(urllib.request.urlopen(f"{self.url}/health", timeout=START).status == 200)
        except OSError:
            return False

    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=START)

    def stop(self, number: int) -> int:
        """The exit code after a signal."""
        self.process.send_signal(number)
        return self.process.wait(timeout=START)


@pytest.fixture
def server(directory: str, tmp_path: Path) -> Iterator[Server]:
    running = Server(directory, tmp_path / "log")
    yield running
    if running.process.poll() is None:
        running.process.kill()
        running.process.wait()


async def stream(client: openai.AsyncOpenAI, model: str, prompt: str, new_tokens: int, stop_after: int | None = None) -> str:
    """The text of one request. After ``stop_after`` pieces the client goes away."""
    pieces = []
    chunks = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=new_tokens,
        temperature=0,
        stream=True,
    )
    async with chunks:
        async for chunk in chunks:
            if chunk.choices and chunk.choices[0].delta.content:
                pieces.append(chunk.choices[0].delta.content)
            if len(pieces) == stop_after:
                break
    return "".join(pieces)


def expected_text(directory: str, prompt: str) -> str:
    """What eager attention says."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    model = MistralForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    tokens = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS)[0, ids.shape[1] :]
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def test_requests_at_once_one_cancelled_one_bad(server: Server, directory: str) -> None:
    async def ask() -> list[Any]:
        async with server.client() as client:
            good = [stream(client, server.model, prompt, NEW_TOKENS) for prompt in PROMPTS]
            cancelled = stream(client, server.model, PROMPTS[0], 2000, stop_after=2)
            bad = stream(client, "another model", PROMPTS[0], NEW_TOKENS)
            unknown = client.post("/chat/completions", body={"model": server.model, "nonsense": 1}, cast_to=object)
            return await asyncio.gather(*good, cancelled, bad, unknown, return_exceptions=True)

    *texts, cancelled, bad, unknown = asyncio.run(ask())
    assert texts == [expected_text(directory, prompt) for prompt in PROMPTS]
    assert isinstance(cancelled, str) and cancelled
    assert isinstance(bad, openai.BadRequestError)
    assert isinstance(unknown, openai.UnprocessableEntityError)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == [server.model]
    assert server.healthy()
    assert server.stop(signal.SIGTERM) == 0, server.log.read_text()
    assert "Traceback" not in server.log.read_text()


def test_the_example_of_a_client(server: Server) -> None:
    """Its questions have no word that the model knows; all are answered."""
    command = [sys.executable, str(EXAMPLES / "serve_client.py"), server.model, server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("?\n  ") == 3


def test_ctrl_c_while_a_request_is_under_way(server: Server) -> None:
    async def ask() -> float:
        async with server.client() as client:
            answer = asyncio.create_task(stream(client, server.model, PROMPTS[0], 100_000))
            await asyncio.sleep(2)
            start = time.monotonic()
            code = await asyncio.to_thread(server.stop, signal.SIGINT)
            assert code == 0, server.log.read_text()
            await asyncio.gather(answer, return_exceptions=True)
            return time.monotonic() - start

    assert asyncio.run(ask()) < serve.GRACE + 20
    assert "Traceback" not in server.log.read_text()


def test_errors_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(pagedflash.transformers.disable)
    run = CliRunner().invoke
    result = run(cli.main, ["serve", str(tmp_path / "nothing")])
    assert result.exit_code == 1 and "there is no" in result.output

    (tmp_path / "config.json").write_text("{}")
    result = run(cli.main, ["serve", str(tmp_path), "--device", "cpu"])
    assert result.exit_code == 1 and "transformers cannot load" in result.output and "Traceback" not in result.output

    with socket.create_server(("localhost", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run(cli.main, ["serve", str(tmp_path), "--device", "cpu", "--port", port])
    assert result.exit_code == 1 and f"cannot listen on localhost:{port}" in result.output

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = run(cli.main, ["serve", str(tmp_path), "--device", "cpu"])
    assert result.exit_code == 1 and "pip install 'transformers[serving]'" in result.output
