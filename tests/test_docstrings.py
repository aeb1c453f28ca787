"""The examples in docstrings run, every public function has one, and its types are the stub's."""

from __future__ import annotations

import doctest
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pagedflash

ROOT = Path(__file__).parents[1]
MODULES = (
    "pagedflash.interface",
    "pagedflash.qkvpacked",
    "pagedflash.dispatch",
    "pagedflash.bert_padding",
    "pagedflash.integrations.transformers",
)
NOT_FUNCTIONS = {"CallKind"}


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    if name.endswith("transformers"):
        pytest.importorskip("transformers")
    module = importlib.import_module(name)
    torch.manual_seed(0)
    flags = doctest.IGNORE_EXCEPTION_DETAIL
    for test in doctest.DocTestFinder().find(module, extraglobs={"torch": torch}):
        result = doctest.DocTestRunner(optionflags=flags).run(test)
        assert not result.failed, test.name


@pytest.mark.parametrize("name", sorted(set(pagedflash.__all__) - NOT_FUNCTIONS))
def test_public_functions_have_an_example(name: str) -> None:
    documented = inspect.getdoc(getattr(pagedflash, name)) or ""
    assert "Examples:" in documented and ">>> " in documented


def test_the_stub_is_written_from_the_signatures() -> None:
    pytest.importorskip("ruff")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/stubs.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "src/pagedflash/py.typed").exists()
