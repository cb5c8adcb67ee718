# Everyday commands. Each sets up .venv by itself; it needs Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV := .venv
# the version that the tests run on; another one in a VENV of its own: make test TORCH=2.14.1 VENV=.venv-newest
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
NEWEST_TORCH := 2.14.1
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
# A file at a time in each of a few processes (tests/conftest.py: how many), for its tests share launches and
# Programs; the long ones first.
FILES_AT_ONCE := --numprocesses auto --dist loadfile --no-loadscope-reorder
# Every style and shared sequences; whole runs over experts, stages, context and FSDP, recomputed too, which meet
# what test_experts.py and test_pipeline.py meet of PyTorch. The search is of numbers, which tests of the trace hold.
ON_NEWEST := tests/distributed/test_styles.py tests/distributed/test_context.py tests/distributed/test_train_axes.py \
	tests/golden tests/unit --ignore=tests/unit/test_search_exact.py
# images often set it; each of the many interpreters that tests start would then compile shardwise anew
unexport PYTHONDONTWRITEBYTECODE
TESTS := tests/distributed tests/e2e tests/programs tests/cuda tests/golden tests/unit

.DEFAULT_GOAL := help
.PHONY: help compare plan explain verify train diff predict test test-all test-newest test-frameworks check lint wheel cuda golden bench docs format clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  ARGS="..." is passed on: make compare ARGS="rowwise colwise --seq 1024"'

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "shardwise needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 ..."; exit 2; }
	@echo "setting up $(VENV) (once; torch is large)"
	$(PYTHON) -m venv $(VENV)
	sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt >$(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev]'
	@touch $@

compare: $(READY) ## run the sharding plans on real ranks and say which is better (about three minutes)
	$(BIN)/shardwise compare $(ARGS)

plan: $(READY) ## make a plan for any model, with the reason for each rule: make plan ARGS="--model hf:qwen3 --mesh tp=8"
	$(BIN)/shardwise plan $(ARGS)

explain: $(READY) ## say what a plan does to a model and why, without a GPU (seconds)
	$(BIN)/shardwise explain $(ARGS)

verify: $(READY) ## prove that a plan trains the unsharded model, or say which gradient is wrong and why (seconds)
	$(BIN)/shardwise verify $(ARGS)

train: $(READY) ## train a model under a plan, on text: make train ARGS="--mesh tp=2 --steps 200 --out run"
	$(BIN)/shardwise train $(ARGS)

diff: $(READY) ## say where the time of profiled steps went: make diff ARGS="run/traces/rowwise run/traces/colwise"
	$(BIN)/shardwise diff $(ARGS)

predict: $(READY) ## say what a step would take on a machine that you needn't have (seconds)
	$(BIN)/shardwise predict $(ARGS)

test: $(READY) ## the tests that show every behaviour, on all cores (about eight minutes on 2)
	$(BIN)/python -m pytest $(TESTS) -m "not full" $(FILES_AT_ONCE) $(ARGS)

test-all: $(READY) ## all tests: the full matrices too, as CI runs them
	$(BIN)/python -m pytest $(TESTS) $(FILES_AT_ONCE) $(ARGS)

test-newest: ## what a step runs, golden files and the unit tests, on the newest torch that shardwise is for
	$(MAKE) test TORCH=$(NEWEST_TORCH) VENV=.venv-newest TESTS="$(ON_NEWEST)"

FRAMEWORKS := .venv-frameworks
test-frameworks: ## the tests of models and trainers of other frameworks, which a venv of its own gets (minutes: it installs torch)
	test -x $(FRAMEWORKS)/bin/pytest || { $(PYTHON) -m venv $(FRAMEWORKS) && \
		sed 's/^torch==.*/torch==$(TORCH)/; s/^transformers==.*/transformers==5.24.0/' constraints.txt >$(FRAMEWORKS)/constraints.txt && \
		$(FRAMEWORKS)/bin/python -m pip install --quiet --constraint $(FRAMEWORKS)/constraints.txt --editable '.[hf]' \
			hypothesis pytest pytest-timeout pyyaml torchdata tiktoken datasets tensorboard accelerate==1.15.0 && \
		$(FRAMEWORKS)/bin/python -m pip install --quiet --no-deps nemo-automodel==0.7.0 lightning==2.6.6 \
			pytorch-lightning==2.6.6 lightning-utilities torchmetrics aiohttp torchtitan==0.3.0 triton spmd_types==0.2.3 tyro pillow einops docstring_parser typeguard; }
	$(FRAMEWORKS)/bin/python -m pytest tests/frameworks -p no:xdist $(ARGS)

check: lint ## lint, the unit tests and the golden files: about two minutes
	$(BIN)/python -m pytest tests/unit tests/golden -m "not full" -q $(FILES_AT_ONCE) $(ARGS)

wheel: $(READY) ## build the wheel and try it in an empty venv, away from the repo (minutes: it installs torch)
	rm -rf build dist
	$(BIN)/python -m build --outdir dist . >/dev/null
	PYTHON=$(PYTHON) .ci/wheel dist/*.whl

cuda: $(READY) ## on a machine with a GPU: tests/cuda, steps, and predictions beside them; under ten minutes
	$(BIN)/python -m benchmarks.cuda $(ARGS)

golden: $(READY) ## accept what small programs are now; read the diff
	$(BIN)/python -m tests.golden.programs

lint: $(READY) ## ruff, mypy --strict, import-linter, and whether the docs are those that the results files give
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m benchmarks.tables --check
	$(BIN)/python docs/build.py --check

bench: $(READY) ## the benchmarks; writes benchmarks/results and the tables in the docs (a quiet machine, about 50 minutes)
	$(BIN)/python -m benchmarks.embedding
	$(BIN)/python -m benchmarks.embedding --tp 4
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.experts
	$(BIN)/python -m benchmarks.explain
	$(BIN)/python -m benchmarks.plan
	$(BIN)/python -m benchmarks.made_plan_step
	$(BIN)/python -m benchmarks.context
	$(BIN)/python -m benchmarks.pipeline
	$(BIN)/python -m benchmarks.watch
	$(BIN)/python -m benchmarks.checkpoints
	$(BIN)/python -m benchmarks.train_loop
	$(BIN)/python -m benchmarks.museum
	$(BIN)/python -m benchmarks.traces
	$(BIN)/python -m benchmarks.calibrated
	$(BIN)/python -m benchmarks.hf_verify
	$(BIN)/python -m benchmarks.published
	$(BIN)/python -m benchmarks.answer
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
	rm -rf .venv .venv-newest build dist runs site .mypy_cache .ruff_cache .pytest_cache .hypothesis
