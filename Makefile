# Two commands on a fresh machine: `make demo` and `make test`. Both set everything up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.mnemon-ready
# What the test suite and the demo may use at most; more threads than cores only slow them down.
THREADS ?= 2
# One row of the matrix stays on one worker, so that its model is built once; naming tests/matrix
# first lets its conftest print the table.
WORKERS = -n $(THREADS) --dist loadgroup

.PHONY: setup demo test test-all lint types imports check clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh
	PYTHON="$(PYTHON)" VENV="$(VENV)" bash scripts/setup.sh
	@touch $(STAMP)

demo: setup
	OMP_NUM_THREADS=$(THREADS) $(BIN)/mnemon demo --out report

test: setup
	$(BIN)/python -m pytest $(WORKERS) -m "not matrix and not slow" tests/matrix tests

test-all: setup
	$(BIN)/python -m pytest $(WORKERS) tests/matrix tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports

check: lint types imports

clean:
	rm -rf $(VENV) report .pytest_cache .mypy_cache .ruff_cache .hypothesis
