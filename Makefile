# Every target sets up its own environment in .venv from a bare clone; nothing needs to be run before it.
# PYTHON names the interpreter to start from (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Two cores are what the project's own checks assume.
JOBS ?= 2

.PHONY: help demo test test-gpu check format bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "path-attention needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)  ## train PaTH and RoPE on flip-flop language modelling and show the difference
	$(BIN)/path-attention demo

# One thread a worker: two workers of two threads each wait for one another more than they compute.
test: $(INSTALLED)  ## the whole test suite on a CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m 'not gpu'

test-gpu: $(INSTALLED)  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

check: $(INSTALLED)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## rewrite the sources to the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## time and memory of the operator on this machine's CPU against torch's attention
	$(BIN)/path-attention benchmark operator

clean:  ## remove the environment and everything a run wrote
	rm -rf $(VENV) runs demo build dist .pytest_cache .mypy_cache .ruff_cache
