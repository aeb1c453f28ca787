"""The README's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, ROOT / "CONTRIBUTING.md", ROOT / "metalsim/README.md", *(ROOT / "docs").glob("*.md"))


def python_blocks(page: Path = README) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def test_the_functions_example_runs_and_writes_the_pages():
    source = next(block for block in python_blocks() if "flash_attn_with_kvcache" in block)
    names: dict[str, torch.Tensor] = {}
    exec(compile(source, str(README), "exec"), names)
    assert names["out"].shape == (2, 1, 32, 128)
    # 17 tokens are in the cache of sequence 0: the new one is the second of its second page, 9.
    assert torch.equal(names["pages_k"][9, 1], names["k"][0, 0])
    assert torch.equal(names["pages_v"][5, 4], names["v"][1, 0])


def test_the_transformers_example_compiles():
    source = next(block for block in python_blocks() if "generate_batch" in block)
    compile(source, str(README), "exec")


def test_the_quantized_example_runs_and_writes_pages_and_scales():
    (source,) = python_blocks(ROOT / "docs/quantization.md")
    names: dict[str, torch.Tensor] = {}
    exec(compile(source, "docs/quantization.md", "exec"), names)
    stored = names["pages_k"][9, 1] * names["scale_k"][9, 1][:, None]
    torch.testing.assert_close(stored, names["k"][0, 0], rtol=0, atol=names["k"].abs().max().item() / 127)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target
