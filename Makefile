# Every target works on a fresh clone: the first one to run makes .venv and installs all that CI uses.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Arguments for the tool behind a target: make test ARGS="-k led", make shootout ARGS="--full"
ARGS ?=

# The oldest transformers the package takes (pyproject.toml); constraints.txt has the newest it was verified with.
OLDEST := 5.17.0
OLDEST_VENV := .venv-oldest

.PHONY: help venv shootout test test-oldest test-long test-cuda lint typecheck format docs-matrix docs-results build clean distclean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

venv: $(STAMP) ## make .venv and install the package with its development tools

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else f"constraints.txt needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

shootout: $(STAMP) ## every backend against the original, on real text: table, JSON, plots
	$(BIN)/attnzoo bench $(ARGS)

test: $(STAMP) ## the test suite (what CI runs)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

$(OLDEST_VENV)/.installed: pyproject.toml constraints.txt Makefile
	test -x $(OLDEST_VENV)/bin/python || $(PYTHON) -m venv $(OLDEST_VENV)
	(grep -vE '^(transformers|huggingface_hub|tokenizers|safetensors)==' constraints.txt; echo transformers==$(OLDEST)) > $(OLDEST_VENV)/constraints.txt
	$(OLDEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]' -c $(OLDEST_VENV)/constraints.txt
	@touch $@

test-oldest: $(OLDEST_VENV)/.installed ## the test suite with the oldest transformers the package takes
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(OLDEST_VENV)/bin/python -m pytest -n 2 $(ARGS)

test-long: $(STAMP) ## the property tests with many more examples
	ATTNZOO_HYPOTHESIS_PROFILE=long OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/properties $(ARGS)

test-cuda: $(STAMP) ## the tests that need a CUDA device
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit(f"make test-cuda needs a CUDA device; torch {torch.__version__} sees none here, so nothing was tested.")'
	$(BIN)/python -m pytest -m cuda $(ARGS)

lint: $(STAMP) ## ruff (rules and format), mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	.ci/typecheck $(BIN)/python
	.ci/lint-imports $(BIN)/python

typecheck: $(STAMP) ## mypy alone
	.ci/typecheck $(BIN)/python

format: $(STAMP) ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs-matrix: $(STAMP) ## docs/matrix.md anew, from what adapters and backends declare
	$(BIN)/attnzoo matrix --markdown > docs/matrix.md

docs-results: $(STAMP) ## docs/results.md anew, from the JSON under benchmarks/results
	$(BIN)/python -m attnzoo.benchmarks.summary benchmarks/results > docs/results.md

build: $(STAMP) ## wheel and sdist into dist/
	$(BIN)/python -m build

clean: ## remove caches and build outputs; keeps .venv and shootout results
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .mypy_tree .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -path ./.git -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf $(VENV) $(OLDEST_VENV)
