"""Every code block of the documentation: Python runs as it stands, commands are ones that exist."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, *(ROOT / name for name in ("CONTRIBUTING.md", "metalsim/README.md")), *sorted((ROOT / "docs").glob("*.md")))

NOT_RUN = {"docs/distributed.md": 1}
"""Page -> its Python blocks that do not run here; each is marked in the page: ``<!-- not run: why -->``."""


class Block(NamedTuple):
    language: str
    source: str
    reason: str  # why it is not run, "" where it is


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"(?:<!-- not run: ([^>]*) -->\n)?^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [Block(language, source, reason) for reason, language, source in found]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from models import save_model

    path = tmp_path_factory.mktemp("model")
    save_model(path)
    return path


@pytest.fixture
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever model is asked of the Hub, a tiny one comes."""
    transformers = pytest.importorskip("transformers")
    path = request.getfixturevalue("tiny_model")
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        load: Callable[..., Any] = kind.from_pretrained
        monkeypatch.setattr(kind, "from_pretrained", lambda name, load=load, **options: load(path, **options))
    yield
    sys.modules["pagedflash.transformers"].disable()


def run_blocks(page: Path) -> dict[str, Any]:
    """Run the blocks of a page one after another, as a reader would type them. Returns the names they leave."""
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page):
        if block.language == "python" and not block.reason:
            exec(compile(block.source, name_of(page), "exec"), names)
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language == "python" for b in blocks(page))], ids=name_of)
def test_python_blocks_run(page: Path, request: pytest.FixtureRequest) -> None:
    if "from transformers" in page.read_text():
        request.getfixturevalue("hub")
    names = run_blocks(page)
    if page == README:
        # 17 tokens are in the cache of sequence 0: the new one is the second of its second page, 9.
        assert torch.equal(names["pages_k"][9, 1], names["k"][0, 0])
        assert torch.equal(names["pages_v"][5, 4], names["v"][1, 0])
    if page.name == "quantization.md":
        stored = names["pages_k"][9, 1] * names["scale_k"][9, 1][:, None]
        torch.testing.assert_close(stored, names["k"][0, 0], rtol=0, atol=names["k"].abs().max().item() / 127)


def test_blocks_that_do_not_run_are_marked_and_counted() -> None:
    marked = {name_of(page): sum(bool(block.reason) for block in blocks(page)) for page in PAGES}
    assert {page: count for page, count in marked.items() if count} == NOT_RUN
    for page in PAGES:
        for block in blocks(page):
            if block.language == "python":
                compile(block.source, name_of(page), "exec")


def commands() -> Iterator[tuple[str, list[str]]]:
    for page in PAGES:
        for block in blocks(page):
            if block.language in ("", "sh") and not block.source.startswith(" "):
                for line in block.source.replace("\\\n", " ").splitlines():
                    yield name_of(page), shlex.split(line, comments=True)


@pytest.mark.parametrize("page, words", [pytest.param(*found, id=" ".join(found[1])) for found in commands() if found[1]])
def test_commands_exist(page: str, words: list[str]) -> None:
    """Makefile targets, files, extras, subcommands and their options."""
    words = [word for word in words if "=" not in word or word.startswith("-") or "==" in word]
    program, *arguments = words
    if program == "pagedflash":
        pytest.importorskip("click")
        from pagedflash.cli.main import main

        command = main.commands[arguments[0]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in arguments if word.startswith("--")} <= known
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert arguments[0] in targets
    elif program in ("python", "pytest", "torchrun"):
        files = [word for word in arguments if word.endswith(".py") and "/" in word]
        assert all((ROOT / file).exists() for file in files)
        assert files or "-m" in arguments or program == "torchrun"
    elif program == "pip":
        extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
        wanted = re.findall(r"pagedflash\[([\w,]+)\]", " ".join(arguments))
        assert arguments[0] == "install" and all(set(names.split(",")) <= extras for names in wanted)
    else:
        pytest.fail(f"{page}: {program} is no command that this test knows")


def messages() -> str:
    """All string constants of the package, those of an f-string joined by an ellipsis."""
    texts: list[str] = []
    for file in (ROOT / "src/pagedflash").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_messages_of_the_troubleshooting_page_are_ours() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    headings = [found for found in re.findall(r"^## (.*)$", page, re.MULTILINE) if "…" in found or "pagedflash:" in found]
    reasons = re.findall(r"^\| ([^|]*…[^|]*|its [^|]*|PyTorch [^|]*) \|", page, re.MULTILINE)
    known = messages()
    assert len(headings) >= 5 and len(reasons) >= 4
    for message in (*headings, *reasons):
        for part in filter(None, re.split(r"\s*…\s*", message)):
            assert part in known, message


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_every_page_of_the_documentation_is_in_its_navigation() -> None:
    """``make docs`` builds it with ``--strict``, which also follows links and finds the functions of the API."""
    configuration = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"([\w-]+\.md)$", configuration, re.MULTILINE))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}
