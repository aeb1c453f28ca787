"""Which numbers the Metal tiling has: from the environment, from a sweep on this GPU, or the defaults."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import metalsim
import pytest
import torch
from metal_harness import require_simulator, sources_of

from pagedflash.backends import metal
from pagedflash.backends.metal import tuning
from pagedflash.backends.metal.compiler import current_target
from pagedflash.cli import doctor, sweep
from pagedflash.cli.generate import GenerateError
from pagedflash.testing import assert_matches_reference, random_problem

GPU = "Apple M3 Max, 40 cores"


@pytest.fixture(autouse=True)
def nothing_is_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    tuning.tuning_in_force.cache_clear()
    yield
    tuning.tuning_in_force.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch find an Apple GPU."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M3 Max")
    monkeypatch.setattr(torch.backends.mps, "get_core_count", lambda: 40)


def test_the_defaults_are_in_force_without_a_word(gpu: None) -> None:
    assert tuning.tuning_in_force() == (metal.Tuning(), "")
    assert doctor.metal_tuning() == (
        "defaults",
        "not tuned for this GPU: pagedflash bench --device mps --sweep does that, once",
    )


def test_the_environment_goes_before_what_is_stored(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tuning.store_tuning(metal.Tuning(load_registers=8))
    assert doctor.metal_tuning() == ("load_registers=8", f"from {file}")
    monkeypatch.setenv(tuning.VARIABLE, "load_registers=32, decode_simdgroups=8")
    tuning.tuning_in_force.cache_clear()
    assert current_target().tuning == metal.Tuning(load_registers=32, decode_simdgroups=8)
    assert doctor.metal_tuning() == ("load_registers=32,decode_simdgroups=8", "from PAGEDFLASH_METAL_TUNING")


def test_an_empty_environment_variable_means_the_defaults(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.store_tuning(metal.Tuning(load_registers=8))
    monkeypatch.setenv(tuning.VARIABLE, "")
    tuning.tuning_in_force.cache_clear()
    assert tuning.tuning_in_force() == (metal.Tuning(), tuning.VARIABLE)


def test_each_gpu_has_its_own(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.store_tuning(metal.Tuning(load_registers=8))
    monkeypatch.setattr(torch.backends.mps, "get_core_count", lambda: 30)
    assert tuning.tuning_in_force().tuning == metal.Tuning()
    file = tuning.store_tuning(metal.Tuning())
    assert tuning.tuning_in_force() == (metal.Tuning(), str(file))
    assert json.loads(file.read_text()) == {GPU: "load_registers=8", "Apple M3 Max, 30 cores": ""}


@pytest.mark.parametrize("text", ("no json", "7", f'{{"{GPU}": "registers=3"}}', f'{{"{GPU}": 7}}'))
def test_a_file_that_cannot_be_used_is_said(gpu: None, text: str) -> None:
    """It may be that of another version, whose numbers were others."""
    tuning.tuning_file().parent.mkdir()
    tuning.tuning_file().write_text(text)
    with pytest.warns(
        RuntimeWarning, match=r"default tuning, since .*metal-tuning.json cannot be used .* --sweep' to write"
    ):
        assert tuning.tuning_in_force() == (metal.Tuning(), "")
    tuning.store_tuning(metal.Tuning(prefill_keys=16))
    assert tuning.tuning_in_force().tuning == metal.Tuning(prefill_keys=16)


@pytest.mark.parametrize("text", ("registers=3", "load_registers", "load_registers=-1", "prefill_keys=0", "prefill_keys=x"))
def test_a_wrong_tuning_is_rejected(gpu: None, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    says = r"PAGEDFLASH_METAL_TUNING has .*, expected name=number"
    with pytest.raises(ValueError, match=says):
        metal.Tuning.parse(text)
    monkeypatch.setenv(tuning.VARIABLE, text)
    with pytest.raises(ValueError, match=says):
        current_target()
    assert says.partition(" ")[0] in str(doctor.metal_tuning())


@pytest.mark.parametrize(
    "text",
    (
        "load_registers=64",
        "load_registers=32,decode_simdgroups=8",
        "decode_rows=8",
        "prefill_simdgroups=8,prefill_keys=16,prefill_registers=32",
        "prefill_keys=64",
    ),
)
def test_every_tuning_computes_the_same(rng: random.Random, text: str) -> None:
    require_simulator()
    for layout in ("paged", "varlen"):
        problem = random_problem(rng, layout=layout, head_dims=(64, 128, 256), capabilities=metal.CAPABILITIES)
        with metal.use_compiler(metalsim.compile_shader, tuning=metal.Tuning.parse(text)):
            assert_matches_reference(problem, metal.attention)


# --------------------------------------------------------------------------------------------------------------------
# The sweep
# --------------------------------------------------------------------------------------------------------------------


class FakeClock:
    """Of a GPU that likes wide loads and two simdgroups, and does not care about the rest."""

    tried = 0

    def prepare(self, run: Callable[[], Any]) -> Callable[[], float]:
        self.tried += 1
        return lambda: 1.0 / current_target().tuning.load_registers + 0.1 * current_target().tuning.decode_simdgroups


def test_the_sweep_finds_the_fastest_numbers() -> None:
    steps: list[sweep.Step] = []
    clock = FakeClock()
    sources_of(lambda: steps.extend(sweep.sweep(sweep.cases("cpu"), clock)))
    best = steps[-1].tuning
    assert best == metal.Tuning(load_registers=64, decode_simdgroups=2)
    assert str(best) == "load_registers=64,decode_simdgroups=2" and metal.Tuning.parse(str(best)) == best
    assert clock.tried == sum(len(step.seconds) for step in steps)
    assert str(metal.Tuning()) == ""


def test_the_sweep_stores_the_best_and_says_so(
    gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "cases", lambda device, cases=sweep.cases: cases("cpu"))
    monkeypatch.setattr(sweep, "WallClock", lambda device, calls: FakeClock())
    sources_of(lambda: sweep.main("mps"))
    printed = " ".join(capsys.readouterr().out.split())
    assert f"decode on {GPU}: microseconds a call" in printed and "decode_simdgroups=8" in printed
    assert "Best: load_registers=64,decode_simdgroups=2." in printed
    assert doctor.metal_tuning() == ("load_registers=64,decode_simdgroups=2", f"from {tuning.tuning_file()}")


def test_there_is_no_sweep_of_another_device() -> None:
    with pytest.raises(GenerateError, match="--sweep is for Apple GPUs, and the device is cpu"):
        sweep.main("cpu")


def test_a_sweep_that_would_have_no_effect_says_so(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.VARIABLE, "load_registers=8")
    with pytest.raises(GenerateError, match=f"{tuning.VARIABLE} is set, and goes before what --sweep stores"):
        sweep.main("mps")
