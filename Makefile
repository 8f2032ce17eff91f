# `make run` trains and compares, `make test` tests, `make soak` tests for hours. Each installs what it needs, once.
PYTHON ?= python3
NEWEST ?= python3.13
# Extra of JAX that `make pack` packs: cuda12, which older drivers run too, cuda13 or tpu; or cpu.
ACCELERATOR ?= cuda12
# Processes of tests: more than two cores, as tests of clusters and processes mostly wait.
WORKERS ?= 3
VENV := .venv
BIN := $(VENV)/bin
# Python 3.11 gets the lowest versions that the project supports, a later one the newest that it was tested with.
CONSTRAINTS := constraints/$(shell $(PYTHON) -c "import sys; print('lowest' if sys.version_info < (3, 12) else 'newest')").txt
# Of each kind of run one; all of what reads the programs that JAX traces.
REPRESENTATIVE := tests/gradnorm tests/sampling tests/scoring tests/lowering_test.py tests/devices_test.py \
  tests/vmapped_test.py tests/run/versions_test.py tests/run/resume_test.py::test_a_run_that_goes_on_is_bit_equal

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test test-newest variants soak representative soak-here lint package pack install
.DELETE_ON_ERROR:

run: install
	@$(BIN)/issgd-jax compare --workdir=runs/digits --overwrite --seeds=3 --uniform_rate=0.02

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# What depends most on the version of JAX, with the newest versions: a virtual environment of its own.
test-newest:
	$(MAKE) representative PYTHON=$(NEWEST) VENV=.venv-newest

# What computes with numbers of the caller, once with 64-bit types and once without the compiled kernels.
variants: $(VENV)/.installed-test
	JAX_ENABLE_X64=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/sampling tests/learning tests/vmapped_test.py
	ISSGD_JAX_KERNELS=0 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/sampling tests/learning tests/vmapped_test.py

# Every repetition and every case that `make test` has a fixed share of, on the lowest and the newest versions; with a
# new seed each time, which it prints.
soak:
	$(MAKE) soak-here
	$(MAKE) soak-here PYTHON=$(NEWEST) VENV=.venv-newest

representative: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(REPRESENTATIVE)

soak-here: $(VENV)/.installed-test
	ISSGD_SOAK=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -o timeout=3600 -o faulthandler_timeout=3000

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	ISSGD_SOAK=1 $(BIN)/python -m pytest tests/package_test.py -k type_checker

# Source distribution and wheel, and the wheel in empty environments.
package:
	.ci/package $(PYTHON) $(CONSTRAINTS)

# All that a machine without network needs to measure its device, in runs/issgd-jax-ACCELERATOR.tar.
pack:
	experiments/benchmarks/pack.sh $(PYTHON) $(CONSTRAINTS) $(ACCELERATOR)

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@echo "installing into $(VENV): a minute or two, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[train]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[test]'
	@touch $@
