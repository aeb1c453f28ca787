"""Options that all tests share."""

from __future__ import annotations

import datetime
import os
import random

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="seed of the random cases (default: today's date)")
    parser.addoption("--nightly", action="store_true", help="run the random tests at twenty times their usual size")
    parser.addoption(
        "--device",
        default="mps" if torch.backends.mps.is_available() else "cpu",
        help="device of the backend tests: cpu (simulated for Metal), mps (the default if there is one) or cuda",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") != "cuda":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton


def _seed(config: pytest.Config) -> int:
    given = config.getoption("--seed")
    return int(datetime.date.today().strftime("%Y%m%d")) if given is None else given


def pytest_report_header(config: pytest.Config) -> str:
    return f"random cases: --seed {_seed(config)}{' --nightly' if config.getoption('--nightly') else ''}"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers that depend on the run's seed and the test's own name."""
    return random.Random(f"{_seed(request.config)} {request.node.nodeid}")


@pytest.fixture
def rounds(request: pytest.FixtureRequest):
    """``rounds(n)``: n, or twenty times n under --nightly."""
    return lambda usual: usual * (20 if request.config.getoption("--nightly") else 1)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")
