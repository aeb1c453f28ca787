"""Tensor parallelism: two ranks give the tokens of one, ``--tp`` speaks with one voice, and what cannot be split is refused.

Run by torchrun, this file is the program of a rank: see :func:`in_a_rank`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("click")

import torch
from models import SIZES, batched, enabled, layouts, padded  # noqa: F401
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

import pagedflash
import pagedflash.transformers
from pagedflash.cli import parallel
from pagedflash.cli.generate import INTERRUPTED, GenerateError, find_model, load
from pagedflash.integrations.transformers import engine, hooks
from pagedflash.integrations.transformers.tensor_parallel import check_ranks

DOCUMENTATION = Path(__file__).parent.parent / "docs/distributed.md"
RANKS = 2
PROMPTS = [[5, 7, 11], [13] * 3 + list(range(17, 60)), [43, 47], [53, 59, 61, 67, 71, 73] * 4]
NEW_TOKENS = 12
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2_moe": dict(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts_per_tok=2),
}
if (
    hooks.version_numbers() >= engine.FIRST_VERSION
):  # continuous batching before it drops windows or keeps no tables for them
    FAMILIES["mistral"] = dict(sliding_window=6)


def in_a_rank(directory: Path, device: str) -> None:
    """Every model of the directory by ``generate()`` and ``generate_batch()``; what came out goes to ``RANK.json``."""
    pagedflash.transformers.enable()
    results = {}
    for family in FAMILIES:
        options: dict[str, Any] = dict(attn_implementation="pagedflash", dtype=torch.float32)
        if int(os.environ["WORLD_SIZE"]) > 1:
            options["tp_plan"] = "auto"
        if device == "cuda" and "moe" in family:
            options["experts_implementation"] = "batched_mm"  # transformers' default cannot be captured in a CUDA graph
        model = AutoModelForCausalLM.from_pretrained(directory / family, **options).to(device)
        keys = model.model.layers[0].self_attn.k_proj.weight
        if isinstance(keys, DTensor):
            keys = keys.to_local()
        with pagedflash.count_calls() as calls:
            results[family] = {
                "generate": padded(model, PROMPTS, NEW_TOKENS),
                "generate_batch": batched(model, PROMPTS, NEW_TOKENS, page_size=16, num_blocks=32),
                "kv_heads": keys.shape[0] // SIZES["head_dim"],
            }
        results[family]["calls"] = dict(layouts(calls))
    ranks = os.environ["WORLD_SIZE"]
    (directory / f"{os.environ['RANK']} of {ranks}.json").write_text(json.dumps(results))
    parallel.leave()


def environment_for(device: str) -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NCCL_GRAPH_MIXING_SUPPORT": "0"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    else:
        environment.pop("TRITON_INTERPRET", None)  # which other tests are run with
    return environment


def torchrun(device: str, ranks: int, *program: str | Path) -> str:
    """What it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run([*command, *program], env=environment_for(device), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_ranks_of_this_file(directory: Path, device: str, ranks: int) -> list[dict[str, Any]]:
    torchrun(device, ranks, __file__, directory, device)
    return [json.loads((directory / f"{rank} of {ranks}.json").read_text()) for rank in range(ranks)]


def need_devices(device: str) -> None:
    if device == "cuda" and torch.cuda.device_count() < RANKS:
        pytest.skip(f"needs {RANKS} GPUs, this machine has {torch.cuda.device_count()}")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_two_ranks_give_the_tokens_of_one(device: str, tmp_path: Path) -> None:
    """Through gloo on CPUs, through NCCL on GPUs. Each rank has half of the KV heads and calls the same kernels."""
    need_devices(device)
    for family, options in FAMILIES.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **{**SIZES, **options})
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / family)
    [one] = run_ranks_of_this_file(tmp_path, device, 1)
    both = run_ranks_of_this_file(tmp_path, device, RANKS)
    for family, alone in one.items():
        assert alone["generate"] == alone["generate_batch"]
        assert alone["calls"]["paged"] > 0
        assert alone["kv_heads"] == SIZES["num_key_value_heads"]
        expected = {**alone, "kv_heads": alone["kv_heads"] // RANKS}
        assert [rank[family] for rank in both] == [expected] * RANKS


def config_with(heads: int, family: str = "llama") -> Any:
    return AutoConfig.for_model(family, num_attention_heads=12, num_key_value_heads=heads, hidden_size=96)


def test_heads_that_do_not_divide_are_refused() -> None:
    for heads, ranks in ((1, 1), (4, 2), (4, 4), (6, 3)):
        check_ranks(config_with(heads), ranks)
    with pytest.raises(ValueError) as caught:
        check_ranks(config_with(3), 2)
    assert str(caught.value) == "pagedflash: 2 ranks cannot share the KV heads of llama (3) evenly; use 1 or 3"
    with pytest.raises(ValueError, match=r"\(2\) evenly; use 1 or 2$"):
        check_ranks(config_with(2), 4)
    check_ranks(config_with(3), 2, {"layers.*.self_attn.k_proj": "colwise_gather_output"})  # every rank has all heads
    check_ranks(AutoConfig.for_model("gpt2"), 5)  # transformers has no plan to split it


@pytest.mark.usefixtures("enabled")
def test_heads_are_checked_when_a_model_is_split() -> None:
    """Before any weight is loaded, and only for our own attention."""
    model = AutoModelForCausalLM.from_config(config_with(3), attn_implementation="pagedflash")
    for options in ({}, {"tp_plan": "auto"}):
        with pytest.raises(ValueError, match="2 ranks cannot share"):
            model.maybe_distribute_model(model, DistributedConfig(tp_size=2, **options), None)
    assert model.maybe_distribute_model(model, DistributedConfig(tp_size=3), None) is model
    model.set_attn_implementation("sdpa")
    assert model.maybe_distribute_model(model, DistributedConfig(tp_size=2), None) is model
    pagedflash.transformers.disable()
    assert "maybe_distribute_model" not in vars(PreTrainedModel)


# --- the ranks of --tp: programs of one line in place of pagedflash


def program(*lines: str) -> list[str]:
    start = "import os, sys, time, signal, pathlib; rank = int(os.environ['RANK'])"
    return [sys.executable, "-c", "\n".join((start, *lines))]


def run_program(*lines: str, ranks: int = 2) -> int:
    return parallel.run_ranks(ranks, torch.device("cpu"), program(*lines))


def test_ranks_know_each_other_and_only_the_first_speaks(capfd: pytest.CaptureFixture[str]) -> None:
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES"
    code = run_program(
        f"print([os.environ[name] for name in {names}])", "print('hm', file=sys.stderr)", "sys.exit(0)", ranks=3
    )
    assert code == 0
    assert capfd.readouterr() == ("['0', '0', '3', '127.0.0.1', '']\n", "hm\n")


def sentence_of(*lines: str) -> str:
    with pytest.raises(GenerateError) as caught:
        run_program(f"file = pathlib.Path(os.environ['{parallel.ERROR_FILE}'])", *lines)
    return str(caught.value)


def test_the_sentence_of_the_rank_that_failed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "GRACE", 1.0)
    assert sentence_of("file.write_text('no such model'); sys.exit(1)") == "no such model", "of all at once"
    failing = "if rank == 1: raise RuntimeError('out of memory')"
    assert sentence_of(failing, "time.sleep(60)") == "RuntimeError: out of memory", "while the other waits for it"
    told = ("time.sleep(0 if rank else 0.5)", "file.write_text('the cause' if rank else 'peer closed'); sys.exit(1)")
    assert sentence_of(*told) == "the cause", "and not what the other makes of it"
    killed = "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)"
    assert sentence_of(killed, "time.sleep(60)") == "rank 1 was ended by signal 9"


def test_a_traceback_of_the_first_rank_is_on_the_terminal_already(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_program("if rank == 0: raise RuntimeError('out of memory')") == 1
    assert capfd.readouterr().err.count("out of memory\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_reaches_every_rank_once(number: signal.Signals, tmp_path: Path) -> None:
    note = f"pathlib.Path({str(tmp_path)!r}, f'{{rank}} {{time.time()}}').touch()"
    lines = (
        f"signal.signal(signal.SIGINT, lambda *_: {note})",
        f"pathlib.Path({str(tmp_path)!r}, f'ready {{rank}}').touch()",
        f"while not list(pathlib.Path({str(tmp_path)!r}).glob(f'{{rank}} *')): time.sleep(0.01)",
        "time.sleep(0.2)",
        f"sys.exit({INTERRUPTED})",
    )

    def send_when_ready() -> None:
        while len(list(tmp_path.glob("ready *"))) < RANKS:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send_when_ready).start()
    assert run_program(*lines) == INTERRUPTED
    assert sorted(path.name[:2] for path in tmp_path.glob("[01] *")) == ["0 ", "1 "]


@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        ("mps", "--tp runs on cuda and cpu, not on mps: transformers splits no model there"),
        ("cuda:0", "--tp takes a GPU for each rank; give --device cuda without a number"),
        ("cuda", "--tp 99 needs 99 GPUs, and this machine has"),
    ],
)
def test_ranks_that_this_machine_does_not_have(device: str, sentence: str) -> None:
    with pytest.raises(GenerateError, match=sentence):
        parallel.run_ranks(99, torch.device(device), program())


def test_a_number_that_torchrun_did_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parallel.loading_options(1) == {}
    assert parallel.loading_options(2)["distributed_config"].tp_size == 2
    with pytest.raises(GenerateError, match="--tp 3 was given to 2 processes; give --tp 2"):
        parallel.loading_options(3)


# --- pagedflash generate --tp


def pagedflash_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pagedflash", *arguments]


@pytest.fixture(scope="module")
def model_with_a_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from test_cli import save_model

    return save_model(tmp_path_factory.mktemp("llama"), "llama", num_key_value_heads=2, max_position_embeddings=4096)


def test_the_script_of_the_documentation(model_with_a_tokenizer: Path, tmp_path: Path) -> None:
    [source] = re.findall(r"```python\n(.*?)```", DOCUMENTATION.read_text(), flags=re.DOTALL)
    script = tmp_path / "two_gpus.py"
    script.write_text(re.sub(r'name = ".*"', f'name = "{model_with_a_tokenizer}"', source))
    assert len(torchrun("cpu", RANKS, script).splitlines()) == 2, "two prompts, printed once"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_generate_with_two_ranks_prints_what_one_prints(device: str, model_with_a_tokenizer: Path) -> None:
    need_devices(device)
    arguments = ("--model", str(model_with_a_tokenizer), "--device", device, "--dtype", "float32", "--prompt", "abc")
    one, two = (
        subprocess.run(
            pagedflash_command("generate", *arguments, "--max-new-tokens", "6", *tp),
            env=environment_for(device),
            capture_output=True,
            text=True,
        )
        for tp in ((), ("--tp", "2"))
    )
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert f" on {device}, 2 ranks, in float32" in two.stdout
    lines = [[line for line in run.stdout.splitlines() if line[:1] in "╭│╰" or " x flash" in line] for run in (one, two)]
    assert len(lines[0]) >= 5 and lines[0] == lines[1]


def test_generate_with_heads_that_do_not_divide(model_with_a_tokenizer: Path) -> None:
    """Each rank refuses them, and it is said once."""
    arguments = ("--model", str(model_with_a_tokenizer), "--device", "cpu", "--prompt", "abc", "--tp", "3")
    run = subprocess.run(pagedflash_command("generate", *arguments), capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.count("Error: ") == 1
    assert run.stderr.endswith("Error: 3 ranks cannot share the KV heads of llama (2) evenly; use 1 or 2\n")


def test_a_model_that_transformers_cannot_split(tmp_path: Path) -> None:
    """It would be whole in every rank."""
    from test_cli import save_model

    files = find_model(str(save_model(tmp_path, "gpt_neo", attention_types=[[["global"], 2]])))
    with pytest.raises(GenerateError, match="transformers has no plan to split gpt_neo over several ranks"):
        load(files, torch.device("cpu"), torch.float32, "sdpa", distributed_config=DistributedConfig(tp_size=2))


def test_an_interrupted_generation_with_two_ranks(model_with_a_tokenizer: Path) -> None:
    arguments = ("--model", str(model_with_a_tokenizer), "--device", "cpu", "--prompt", "abc", "--max-new-tokens", "4000")
    process = subprocess.Popen(
        pagedflash_command("generate", *arguments, "--tp", "2"),
        env={**os.environ, "FORCE_COLOR": "1"},  # rich then draws its bars into a pipe too
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr and process.stdout
    seen = b""
    while b"pagedflash: generating" not in seen:
        seen += (chunk := process.stderr.read1())
        assert chunk, seen.decode()
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, stderr.decode()
    assert stdout.count(b"Interrupted") == 1 and b"Traceback" not in stderr


if __name__ == "__main__":
    in_a_rank(Path(sys.argv[1]), sys.argv[2])
