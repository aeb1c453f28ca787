"""The benchmarks run, check what they state, and are what the documentation says they are."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import run, suite  # noqa: E402
from benchmarks.suites import cpu, cuda, generate, metal  # noqa: E402

import pagedflash  # noqa: E402
from pagedflash.cli import baselines, bench, measure  # noqa: E402
from pagedflash.cli.baselines import flex, openvino, sdpa  # noqa: E402
from pagedflash.cli.measure import Contender, WallClock  # noqa: E402

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]


@pytest.fixture(autouse=True)
def nothing_left_out() -> Iterator[None]:
    yield
    suite.left_out.clear()
    suite.not_wanted.clear()


# --------------------------------------------------------------------------------------------------------------------
# The suites
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in suite.SUITES if not name.startswith(("cuda", "generate", "training"))])
def test_suites_run_and_hold(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """At tiny sizes: contenders agree, and what is counted is what the documentation states."""
    if missing := suite.SUITES[name].needs():
        pytest.skip(missing)
    code = run.main([name, "--quick", "--check"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert f"{name}: {suite.SUITES[name].description}" in printed.out and "\n| case " in printed.out


class CountingClock:
    """Times nothing."""

    def prepare(self, run: Callable[[], Any]) -> Callable[[], float]:
        return lambda: 1e-3


@pytest.fixture
def cuda_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA suites' problems and contenders, on CPU tensors."""
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    monkeypatch.setattr(cuda, "DTYPE", torch.float32)
    monkeypatch.setattr(cuda, "GraphClock", lambda written=False: CountingClock())
    monkeypatch.setattr(cuda, "HostClock", CountingClock)
    monkeypatch.setattr(cuda, "compile_ahead", lambda cases: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.usefixtures("cuda_on_cpu")
@pytest.mark.parametrize(
    "name",
    ["cuda-decode", "cuda-speculative", "cuda-quantized", "cuda-prefill", "cuda-training", "cuda-window", "cuda-mixed"],
)
def test_cuda_suites_agree_with_themselves(name: str) -> None:
    rows = list(suite.SUITES[name].run(suite.Options(quick=True)))
    assert rows and not any(row.failures for row in rows)
    if name == "cuda-mixed":
        assert all(row.figures["x two calls"] == 1 for row in rows)


def test_the_grid_of_decode() -> None:
    cases = cuda.grid()
    assert len(cases) == 124
    row = suite.Row("", {"KV MB": 100.0, "of read bandwidth": 0.5, "x FlashInfer": 2.0})
    faster = suite.Row("", {"KV MB": 10.0, "of read bandwidth": 0.5, "x FlashInfer": 8.0})
    summary = {found.case: found.figures for found in cuda.summary([(cases[0][0], row), (cases[0][0], faster)])}
    assert summary["all"]["shapes"] == 2 and summary["0 to 30 MB"]["shapes"] == 1
    assert summary["all"]["x FlashInfer, least"] == 2 and summary["all"]["x FlashInfer, mean"] == pytest.approx(4)


@pytest.mark.parametrize("name", ["generate-decode", "generate-mixed", "generate-windows"])
def test_generation_on_a_tiny_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    from benchmarks import continuous_batching

    def tiny() -> Any:
        torch.manual_seed(0)
        config = transformers.MistralConfig(
            vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, sliding_window=8, initializer_range=0.4, attn_implementation="sdpa",
        )  # fmt: skip
        return transformers.MistralForCausalLM(config).eval()

    monkeypatch.setattr(continuous_batching, "smollm2", tiny)
    monkeypatch.setattr(continuous_batching, "random_mistral", tiny)
    try:
        (row,) = suite.SUITES[name].run(suite.Options(rounds=1, quick=True))
    finally:
        continuous_batching.pagedflash.transformers.disable()
    assert not row.failures and row.figures["tokens/s"] > 0


def test_fine_tuning_a_tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    from benchmarks import fine_tuning

    from pagedflash.cli.generate import Loaded

    def tiny() -> Loaded:
        config = transformers.LlamaConfig(
            vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, attn_implementation="sdpa",
        )  # fmt: skip
        return Loaded(transformers.LlamaForCausalLM(config), lambda text: {"input_ids": [ord(x) % 100 for x in text]})

    monkeypatch.setattr(fine_tuning, "smollm2", tiny)
    try:
        with pagedflash.count_calls() as calls:
            *_, last = suite.SUITES["training-smollm2"].run(suite.Options(quick=True))
    finally:
        pagedflash.transformers.disable()
    assert not last.failures and calls.total() == 4 * 2
    monkeypatch.setattr(fine_tuning, "losses", lambda model, attention, inputs: [1.0 + (attention == "sdpa")] * 4)
    *_, last = suite.SUITES["training-smollm2"].run(suite.Options(quick=True))
    assert last.failures == ["losses differ by up to 1"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fine_tuning_smollm2(request: pytest.FixtureRequest) -> None:
    """Five steps."""
    if not request.config.getoption("--nightly"):
        pytest.skip("takes a minute: --nightly runs it")
    if missing := suite.SUITES["training-smollm2"].needs():
        pytest.skip(missing)
    from benchmarks import fine_tuning

    model, tokenizer = fine_tuning.smollm2()
    inputs = fine_tuning.batches(tokenizer, 5, 96)
    try:
        ours, theirs = (fine_tuning.losses(model, name, inputs) for name in ("pagedflash", "sdpa"))
    finally:
        pagedflash.transformers.disable()
    assert ours == pytest.approx(theirs, abs=1e-4) and ours[-1] < ours[0]


def test_tokens_that_differ_are_counted() -> None:
    from types import SimpleNamespace

    runs = [SimpleNamespace(prefill=1.0, decode=0.1, tokens=tokens) for tokens in ([[1, 2], [3, 4]], [[1, 2], [3, 5]])]
    row = generate.compared_runs("", {"pagedflash": runs[:1], "sdpa": runs[1:]}, requests=2)
    assert row.failures == ["1 of 4 tokens are not those of sdpa"]


# --------------------------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------------------------


def test_without_a_suite_they_are_listed() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout
    for found in suite.SUITES.values():
        assert re.search(rf"^{found.name} +{re.escape(found.description)}", printed, re.MULTILINE)
        assert found.description


def test_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    results, picture = tmp_path / "results.json", tmp_path / "picture.svg"
    arguments = ["cpu-prefill", "cpu-context", "--quick", "--rounds", "3", "--json", str(results), "--plot", str(picture)]
    assert run.main(arguments) == 0
    report = json.loads(results.read_text())
    assert report["torch"] == torch.__version__ and set(report["suites"]) == {"cpu-prefill", "cpu-context"}
    first = report["suites"]["cpu-prefill"][0]
    assert first["figures"]["ms"] > 0 and len(first["seconds"]["pagedflash"]) == 3
    assert "gather + SDPA" in report["suites"]["cpu-context"][0]["figures"]
    assert picture.read_text().startswith("<?xml")


def test_a_group_is_all_its_suites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # what cpu-threads needs
    assert [found.name for found in run.choose(["cpu"])] == [name for name in suite.SUITES if name.startswith("cpu-")]


def test_a_suite_that_is_not_there() -> None:
    with pytest.raises(SystemExit, match="there is no suite cpu-dekode"):
        run.main(["cpu-dekode"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can")
def test_a_suite_that_cannot_run_here(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run.main(["cuda-decode"])
    assert end.value.code == 1 and "cuda-decode cannot run here: there is no CUDA device" in capsys.readouterr().err


def test_check_fails_where_outputs_differ(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = cpu.prefill_contenders

    def wrong(*tensors: Any) -> dict[str, Contender]:
        return right(*tensors) | {"pagedflash": Contender(lambda: tensors[0])}

    monkeypatch.setattr(cpu, "prefill_contenders", wrong)
    assert run.main(["cpu-prefill", "--quick", "--check"]) == 1
    assert "FAILED cpu-prefill, 32/8 heads of 128, float32, 128 tokens: the output of SDPA" in capsys.readouterr().err
    assert run.main(["cpu-prefill", "--quick"]) == 0


def test_check_fails_where_counts_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("metalsim")
    monkeypatch.setattr(metal, "MAX_BYTES", 1.0)
    assert run.main(["metal-counters", "--quick", "--check"]) == 1
    assert "x the bytes of K and V loaded, more than 1.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, reason",
    [
        (ImportError("No module named 'openvino'"), "No module named 'openvino'"),
        (baselines.CannotRun("no such cache"), "no such cache"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
    ],
    ids=["not installed", "not for it", "broken"],
)
def test_a_baseline_that_does_not_run_is_left_out(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(problem: Any) -> Contender:
        raise error

    monkeypatch.setattr(openvino, "decode", fail)
    assert run.main(["cpu-hot", "--quick", "--check"]) == 0
    printed = capsys.readouterr()
    assert printed.err.count(f"without OpenVINO: {reason}") == 1
    assert "x gather + SDPA" in printed.out and "x OpenVINO" not in printed.out


def test_a_signal_after_a_baseline_has_run() -> None:
    """OpenVINO gives signals a stack of its own where the processor has AMX: it has to be there as long as it is in use."""
    pytest.importorskip("openvino")
    script = """if True:
        import gc, signal
        from pagedflash.cli.baselines import openvino
        from pagedflash.testing import paged_problem
        first, second = (openvino.decode(paged_problem([3])) for _ in range(2))
        del first
        gc.collect()
        del second
        gc.collect()
        came = []
        signal.signal(signal.SIGTERM, lambda *_: came.append(1))
        signal.raise_signal(signal.SIGTERM)
        assert came
    """
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_a_baseline_that_is_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["cpu-hot", "--quick", "--without", "OpenV"]) == 0
    assert "OpenVINO ms" not in capsys.readouterr().out


def test_tables_are_put_into_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(options: suite.Options) -> Iterator[suite.Row]:
        """A table."""
        yield suite.Row("one", {"us": 12.345, "kernel": "decode"})
        yield suite.Row("two", {"us": 1234.5, "kernel": "prefill"})
        yield suite.Row("three", {"bytes": 7})

    monkeypatch.setitem(suite.SUITES, "some-counts", suite.Suite("some-counts", rows, lambda: ""))
    document = tmp_path / "document.md"
    document.write_text("before\n<!-- some-counts -->\nold\n<!-- end of some-counts -->\nafter\n")
    assert run.main(["some-counts", "--into", str(document)]) == 0
    lines = [re.sub(" +", " ", line) for line in document.read_text().splitlines()]
    assert lines == [
        "before",
        "<!-- some-counts -->",
        "| case | us | kernel |",
        "|---|---:|---:|",
        "| one | 12.3 | decode |",
        "| two | 1234 | prefill |",
        "",
        "| case | bytes |",
        "|---|---:|",
        "| three | 7 |",
        "<!-- end of some-counts -->",
        "after",
    ]
    with pytest.raises(SystemExit, match=r"README\.md has no <!-- some-counts -->"):
        run.main(["some-counts", "--into", str(ROOT / "README.md")])


# --------------------------------------------------------------------------------------------------------------------
# The documentation
# --------------------------------------------------------------------------------------------------------------------


def test_commands_in_the_documentation_are_right() -> None:
    named = {
        word
        for document in DOCUMENTS
        for command in re.findall(r"(?:benchmarks/run\.py |suite `)([a-z][^`\n]*)", document.read_text())
        for word in command.split(" -")[0].split()
    }
    groups = {name.partition("-")[0] for name in suite.SUITES}
    assert named and named <= suite.SUITES.keys() | groups
    assert groups <= {word.partition("-")[0] for word in named}, "a group of suites that no document names"


def test_scripts_in_the_documentation_are_there() -> None:
    for document in DOCUMENTS:
        for path in re.findall(r"benchmarks/[\w/]+\.py", document.read_text()):
            assert (ROOT / path).is_file(), f"{document.name} names {path}"


# --------------------------------------------------------------------------------------------------------------------
# pagedflash bench, and measuring
# --------------------------------------------------------------------------------------------------------------------

QUICK: dict[str, Any] = dict(contexts=(32, 64), prompts=(16, 32), cache_bytes=1 << 18, rounds=2)


@pytest.fixture
def few_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that runs, as slow as SDPA; one that is not installed; one that breaks."""

    def missing() -> Contender:
        raise ImportError("No module named 'other'")

    def broken() -> Contender:
        raise ZeroDivisionError("by zero")

    peers = {"other, one": missing, "other, two": missing, "third": broken}
    monkeypatch.setattr(bench, "decode_peers", lambda problem: peers | {"peer": lambda: sdpa.gather_decode(problem, False)})
    monkeypatch.setattr(bench, "prefill_peers", lambda q, k, v: peers | {"peer": lambda: sdpa.prompt(q, k, v, False)})


@pytest.mark.usefixtures("few_peers")
def test_bench_measures_decode_and_prefill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    results, picture = tmp_path / "results.json", tmp_path / "picture.svg"
    report = bench.main("cpu", torch.bfloat16, results, picture, **QUICK)
    assert [row["context"] for row in report["decode"]] == [32, 64]
    assert [row["tokens"] for row in report["prefill"]] == [16, 32]
    assert set(report["decode"][0]["gb_per_second"]) == {"pagedflash", "gather + SDPA", "peer", "streaming"}
    assert set(report["prefill"][0]["tflop_per_second"]) == {"pagedflash", "SDPA", "peer"}
    assert set(report["load"]) == {"before", "others", "steal"}
    assert json.loads(results.read_text())["verdict"] == report["verdict"]
    assert picture.read_text().startswith("<?xml")
    printed = capsys.readouterr().out
    assert report["verdict"] in printed and "bfloat16" in printed
    assert "without other: No module named 'other'\nwithout third: ZeroDivisionError: by zero\n" in printed


def test_the_verdict_is_one_line() -> None:
    report = {
        "decode": [
            {"gb_per_second": {"pagedflash": 8.0, "gather + SDPA": 2.0, "OpenVINO": 4.0, "streaming": 10.0}},
            {"gb_per_second": {"pagedflash": 6.0, "gather + SDPA": 1.0, "streaming": 10.0}},
        ],
        "prefill": [{"tflop_per_second": {"pagedflash": 0.3, "SDPA": 0.2}}],
    }
    assert bench.verdict(report) == (
        "pagedflash decodes at up to 80% of streaming bandwidth, 4 to 6 x as fast as gather + SDPA, 2 x as fast as OpenVINO;"
        " it prefills 1.5 x as fast as SDPA."
    )


def test_bench_compares_with_the_packages_of_the_device() -> None:
    problem = bench.paged_problem([20], heads=(4, 2), head_dim=32)
    assert {name.partition(",")[0] for name in bench.decode_peers(problem)} == {"OpenVINO", "vLLM"}
    assert set(baselines.cuda_decode(problem)) >= {"FlashInfer, fa3", "FA2", "FA3 on contiguous keys", "FA4", "vLLM, Triton"}
    prompt = bench.dense_prompt(8, bench.Shape((4, 2), 32))
    assert {name.partition(",")[0] for name in bench.prefill_peers(*prompt)} == {"zentorch", "vLLM", "flex_attention"}


def test_flex_attention_gives_the_same(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Not compiled, but for the nightly run."""
    from torch.nn.attention.flex_attention import flex_attention

    if not request.config.getoption("--nightly"):
        monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    prompt = bench.dense_prompt(40, bench.Shape((4, 2), 32))
    found = measure.interleave(bench.prefill_contenders(*prompt) | {"flex": flex.prefill(*prompt)}, 1, WallClock())
    assert "flex" in found.differences and not found.disagreements()


def test_a_busy_machine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 seconds of all processors 60 are others' work, 5 are stolen."""
    now = iter([(0.0, 0.0, 0.0, 0.0), (100.0, 80.0, 5.0, 20.0)])
    monkeypatch.setattr(measure.Load, "_now", staticmethod(lambda: next(now)))
    monkeypatch.setattr(measure.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    load = measure.Load().report()
    assert load == {"before": 0.0, "others": 0.6, "steal": 0.05}
    said = measure.describe_load(load)
    assert said.startswith("The machine was busy: other programs took 60% of its processors and other virtual machines 5%.")
    assert not measure.describe_load({"before": 0.1, "others": 0.05, "steal": 0.0})
    assert "load average was 50%" in measure.describe_load({"before": 0.5, "others": 0.0, "steal": 0.0})


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="Linux counts them")
def test_own_work_is_not_that_of_others() -> None:
    total, busy, _, ours = measure.Load._now()
    assert total >= busy > 0 and ours > 0


@pytest.mark.parametrize("num_queries", (1, 3))
def test_gathering_gives_the_same(num_queries: int) -> None:
    problem = bench.paged_problem([20, 33], heads=(4, 2), head_dim=32, num_queries=num_queries)
    found = measure.interleave(bench.decode_contenders(problem), 1, WallClock())
    assert len(found.seconds) == (3 if num_queries == 1 else 2) and not found.disagreements()


def test_outputs_that_differ_are_said() -> None:
    contenders = {name: Contender(lambda value=value: torch.full((2,), value)) for name, value in (("a", 1.0), ("b", 1.1))}
    found = measure.interleave({**contenders, "nan": Contender(lambda: torch.full((2,), torch.nan))}, 1, WallClock())
    said = found.disagreements()
    assert len(said) == 2 and said[0] == "the output of b differs from that of a by 0.1, relative to its size"
    with pytest.raises(ValueError, match="of shape"):
        measure.interleave({**contenders, "c": Contender(lambda: torch.ones(3))}, 1, WallClock())


def test_the_fastest_variant_counts() -> None:
    seconds = {"ours": [1.0, 2.0], "SDPA, folded": [3.0, 3.0], "SDPA, repeated": [2.0, 4.0], "SDPA, slow": [9.0, 9.0]}
    found = measure.Measured(seconds, dict.fromkeys(seconds, 0.0), 0.1)
    assert found.fastest() == {"ours": "ours", "SDPA": "SDPA, folded"}
    assert found.ratio("SDPA, repeated", "ours") == 2.0
