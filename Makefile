# `make run` trains and compares, `make test` tests, `make soak` tests for hours. Each installs what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test soak lint install
.DELETE_ON_ERROR:

run: install
	@$(BIN)/python -m experiments.compare --config=experiments/configs/digits.py --workdir=runs/digits --overwrite --seeds=3 --uniform_rate=0.02

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Every repetition and every case that `make test` has a fixed share of; with a new seed each time, which it prints.
soak: $(VENV)/.installed-test
	ISSGD_SOAK=1 $(BIN)/python -m pytest -n 2 --dist worksteal -o timeout=3600 -o faulthandler_timeout=3000

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@echo "installing into $(VENV): a minute or two, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[test]'
	@touch $@
