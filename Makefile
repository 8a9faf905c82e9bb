# Two commands on a fresh machine: `make demo` and `make test`. Both set everything up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.mnemon-ready
# The extension is built with the environment: editing it makes `make` build it again.
NATIVE := CMakeLists.txt $(wildcard src/mnemon/attention/native/*)
# What the test suite and the demo may use at most; more threads than cores only slow them down.
THREADS ?= 2
# One row of the matrix stays on one worker, so that its model is built once; naming tests/matrix
# first lets its conftest print the table.
WORKERS = -n $(THREADS) --dist loadgroup

# Releases of transformers besides the current one, each in an environment of its own.
OTHERS := 4.57 5.14
OTHER_STAMPS := $(OTHERS:%=.venv-%/.mnemon-ready)

.PHONY: setup demo demo-diffusion test test-all test-exports test-matrix test-oldest sanitize surface lint types imports check \
	clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh $(NATIVE)
	PYTHON="$(PYTHON)" VENV="$(VENV)" bash scripts/setup.sh
	@touch $(STAMP)

demo: setup
	OMP_NUM_THREADS=$(THREADS) $(BIN)/mnemon demo --out report

# Caching between denoising steps, on the bundled DiT: a minute.
demo-diffusion: setup
	OMP_NUM_THREADS=$(THREADS) $(BIN)/mnemon diffusion demo --out report

test: setup
	$(BIN)/python -m pytest $(WORKERS) -m "not matrix and not slow and not exports" tests/matrix tests

# Every architecture on every export target: half an hour.
test-exports: setup
	$(BIN)/python -m pytest $(WORKERS) -m exports tests/export

test-all: setup
	$(BIN)/python -m pytest $(WORKERS) tests/matrix tests

.venv-%/.mnemon-ready: pyproject.toml constraints.txt constraints-%.txt scripts/setup.sh $(NATIVE)
	PYTHON="$(PYTHON)" TRANSFORMERS="$*" VENV=".venv-$*" bash scripts/setup.sh
	@touch $@

# Contract, equality and what reads or writes a cache, on every release; a table at the end.
test-matrix: setup $(OTHER_STAMPS)
	$(BIN)/python scripts/test_versions.py --workers $(THREADS) $(OTHERS) current

test-oldest: setup .venv-4.57/.mnemon-ready
	$(BIN)/python scripts/test_versions.py --workers $(THREADS) 4.57

# The native kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer; minutes.
sanitize: setup
	VENV="$(VENV)" bash scripts/sanitize.sh

# What mnemon rests on in the installed transformers; fails if a name changed.
surface: setup
	$(BIN)/python scripts/surface.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports

check: lint types imports

clean:
	rm -rf $(VENV) $(OTHERS:%=.venv-%) build report .pytest_cache .mypy_cache .ruff_cache .hypothesis
