# Every target works in a fresh clone: the first one creates .venv and installs the versions that CI uses.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# ARGS are arguments for the tool that a target runs: make test ARGS="-k led", make shootout ARGS="--full"
ARGS ?=
# The tests start many processes. Each has one thread, and shares the compiled bytecode even if the shell forbids to write it.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=

# The oldest supported transformers (see pyproject.toml), and the newest that the adapters are verified with.
# constraints.txt pins the version that the results in this repository were made with.
OLDEST := 5.17.0
NEWEST := 5.24.0
OTHER_VENVS := .venv-oldest .venv-newest

.PHONY: help venv shootout test test-oldest test-newest test-long test-interpreted gpu test-cuda mutants lint typecheck format docs docs-matrix docs-results docs-prediction docs-advice docs-plot docs-notebook docs-architectures build clean distclean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

venv: $(STAMP) ## create .venv and install the package with its development tools

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else f"constraints.txt needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

shootout: $(STAMP) ## run the benchmark: every backend against the original model; write JSON and plots
	$(BIN)/attnzoo bench $(ARGS)

test: $(STAMP) ## run the tests, as CI does
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

.venv-oldest/.installed: TRANSFORMERS := $(OLDEST)
.venv-newest/.installed: TRANSFORMERS := $(NEWEST)
$(OTHER_VENVS:=/.installed): pyproject.toml constraints.txt Makefile
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	(grep -vE '^(transformers|huggingface_hub|tokenizers|safetensors)==' constraints.txt; echo transformers==$(TRANSFORMERS)) > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]' -c $(@D)/constraints.txt
	@touch $@

test-oldest: .venv-oldest/.installed ## run the tests with the oldest supported transformers
	$(TEST_ENV) .venv-oldest/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

test-newest: .venv-newest/.installed ## run the tests with the newest verified transformers
	$(TEST_ENV) .venv-newest/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

test-long: $(STAMP) ## run the property tests with more than 25,000 examples per exact backend (1 to 2 hours on 2 cores)
	ATTNZOO_HYPOTHESIS_PROFILE=long $(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal tests/properties $(ARGS)

test-interpreted: $(STAMP) ## run the whole conformance kit on the Triton kernels, interpreted on the CPU, and compile them for three cards
	ATTNZOO_HYPOTHESIS_PROFILE=long TRITON_INTERPRET=1 ATTNZOO_INTERPRETED_EXAMPLES=50 $(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal tests/backends/triton/interpreted $(ARGS)
	ATTNZOO_HYPOTHESIS_PROFILE=long $(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal tests/backends/triton/test_compiled.py $(ARGS)

# Without a virtual environment, the packages of $(PYTHON) run the checkout: nothing is installed, no network is needed.
gpu: ## measure what matters on a CUDA device, within five minutes: make gpu ARGS="--seconds 3600 --out DIR"
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu/checkout.py $(ARGS)

test-cuda: $(STAMP) ## run the tests that need a CUDA device, in 8 processes
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit(f"make test-cuda needs a CUDA device; torch {torch.__version__} sees none here, so nothing was tested.")'
	ATTNZOO_HYPOTHESIS_PROFILE=cuda OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 8 -m cuda $(ARGS)

mutants: $(STAMP) ## plant 200 random faults in the source and list those that no test catches
	$(TEST_ENV) $(BIN)/python -m tests.mutants $(ARGS)

lint: $(STAMP) ## run ruff (rules and format), mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	.ci/typecheck $(BIN)/python
	.ci/lint-imports $(BIN)/python

typecheck: $(STAMP) ## run mypy
	.ci/typecheck $(BIN)/python

format: $(STAMP) ## fix and format the code with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## build the documentation site in site/, with every warning as an error; needs no network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

docs-matrix: $(STAMP) ## write docs/matrix.md from the declarations of adapters and backends
	$(BIN)/attnzoo matrix --markdown > docs/matrix.md

docs-results: $(STAMP) ## write docs/results.md from the JSON files in benchmarks/results
	$(BIN)/python -m attnzoo.benchmarks.summary benchmarks/results > docs/results.md

docs-prediction: $(STAMP) ## count what attention modules would start on a GPU, and write the counts to benchmarks/results
	OMP_NUM_THREADS=1 $(BIN)/python -m attnzoo.benchmarks.gpu.prediction --json benchmarks/results/gpu_prediction.json

docs-advice: $(STAMP) ## write docs/guide/which-backend.md from the JSON files in benchmarks/results
	$(BIN)/python -m attnzoo.benchmarks.advice benchmarks/results > docs/guide/which-backend.md

docs-plot: $(STAMP) ## draw docs/images/led-model.png from a JSON file in benchmarks/results
	$(BIN)/python -m attnzoo.benchmarks.plots benchmarks/results/epyc-cpu-time/led-model-forward.json docs/images/led-model.png

docs-notebook: $(STAMP) ## run examples/shootout.ipynb and store its results in it
	$(BIN)/python .ci/execute-notebook examples/shootout.ipynb

docs-architectures: $(STAMP) ## patch a tiny model of every model type of transformers and write docs/architectures.md (30 minutes)
	rm -f benchmarks/results/architectures.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python -m attnzoo.benchmarks.architectures --json benchmarks/results/architectures.jsonl $(ARGS)
	$(BIN)/python -m attnzoo.benchmarks.architectures --json benchmarks/results/architectures.jsonl --markdown docs/architectures.md

build: $(STAMP) ## build wheel and sdist in dist/
	$(BIN)/python -m build

clean: ## remove caches and build outputs; keep .venv and results of the shootout
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .mypy_tree .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -path ./.git -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## the same, and remove .venv
	rm -rf $(VENV) $(OTHER_VENVS)
