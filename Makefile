# Everyday commands. Each sets up .venv by itself; it needs Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
ALL_CORES := --numprocesses auto --dist worksteal
FILES_AT_ONCE := --numprocesses auto --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help compare explain verify diff predict test check lint golden bench docs format clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  ARGS="..." is passed on: make compare ARGS="rowwise colwise --seq 1024"'

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "shardwise needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 ..."; exit 2; }
	@echo "setting up $(VENV) (once; torch is large)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

compare: $(READY) ## run the sharding plans on real ranks and say which is better (about three minutes)
	$(BIN)/shardwise compare $(ARGS)

explain: $(READY) ## say what a plan does to a model and why, without a GPU (seconds)
	$(BIN)/shardwise explain $(ARGS)

verify: $(READY) ## prove that a plan trains the unsharded model, or say which gradient is wrong and why (seconds)
	$(BIN)/shardwise verify $(ARGS)

diff: $(READY) ## say where the time of profiled steps went: make diff ARGS="run/traces/rowwise run/traces/colwise"
	$(BIN)/shardwise diff $(ARGS)

predict: $(READY) ## say what a step would take on a machine that you needn't have (seconds)
	$(BIN)/shardwise predict $(ARGS)

test: $(READY) ## all tests, on all cores; those that start ranks or a browser a file at a time, for they share a launch (15 to 25 minutes on 2 cores)
	$(BIN)/python -m pytest tests/unit tests/golden tests/programs $(ALL_CORES) $(ARGS)
	$(BIN)/python -m pytest tests/distributed tests/e2e tests/cuda $(FILES_AT_ONCE) $(ARGS)

check: lint ## lint, the unit tests and the golden files: about two minutes
	$(BIN)/python -m pytest tests/unit tests/golden -q $(ALL_CORES) $(ARGS)

golden: $(READY) ## accept what small programs are now; read the diff
	$(BIN)/python -m tests.golden.programs

lint: $(READY) ## ruff, mypy --strict, import-linter, and whether the docs are those that the results files give
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m benchmarks.tables --check
	$(BIN)/python docs/build.py --check

bench: $(READY) ## the benchmarks; writes benchmarks/results and the tables in the docs (a quiet machine, about 45 minutes)
	$(BIN)/python -m benchmarks.embedding
	$(BIN)/python -m benchmarks.embedding --tp 4
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.explain
	$(BIN)/python -m benchmarks.traces
	$(BIN)/python -m benchmarks.calibrated
	$(BIN)/python -m benchmarks.hf_verify
	$(BIN)/python -m benchmarks.published
	$(BIN)/python -m benchmarks.measured_steps
	$(BIN)/python -m benchmarks.verify_mutants
	$(BIN)/python -m benchmarks.tables

docs: $(READY) ## write the generated parts of the docs anew, and the site: site/index.html opens offline
	$(BIN)/python -m benchmarks.tables
	$(BIN)/python docs/build.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: $(READY) ## format and sort imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what the other commands made
	rm -rf $(VENV) runs site .mypy_cache .ruff_cache .pytest_cache .hypothesis
