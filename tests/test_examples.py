"""The examples run as they stand, are short, and say what their first lines promise."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
LINES = 60
ELSEWHERE = {"serve_client": "tests/test_serve.py, beside a server"}
PRINTS = {
    "chunked_prefill": r"4 chunks of up to 256 tokens; largest difference from one call: \d\.\de[-+]\d+",
    "decode_loop": r"40 steps, 9 of 32 pages used",
    "new_backend": r"new_backend on cpu, seed 0: all passed",
    "quantized_cache": r"int8: 272 bytes a token, outputs differ by 0\.\d+%",
    "shared_prefix": r"keys read: 1280 instead of 8960",
    "speculative": r"48 tokens in 12 calls instead of 48; the same: True",
    "train_packed": r"30 steps, loss \d\.\d\d to 0\.\d\d; 60 calls, varlen",
    "transformers_generate": r"\d+ calls: paged",
}
"""Example -> what it prints, as a regular expression."""


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(example.read_text().splitlines()) < LINES
    if example.stem in ELSEWHERE:
        pytest.skip(f"run by {ELSEWHERE[example.stem]}")
    arguments = []
    if example.stem == "transformers_generate":
        pytest.importorskip("transformers")
        from models import save_model

        save_model(tmp_path)
        arguments = [str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(example), *arguments])
    try:
        runpy.run_path(str(example), run_name="__main__")
    except SystemExit as end:
        assert not end.code
    finally:
        if "pagedflash.transformers" in sys.modules:
            sys.modules["pagedflash.transformers"].disable()
    assert re.search(PRINTS[example.stem], capsys.readouterr().out)
