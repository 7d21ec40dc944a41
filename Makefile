# nexa: `make train` and `make test` need Python >= 3.11 and make, nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN ?= quickstart
JOBS ?= 2

.PHONY: help setup train test grid lint clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(STAMP)  ## make .venv with the pinned versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"nexa needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}; use make PYTHON=python3.12" if v < (3, 11) else 0)'
	@echo "== setting up $(VENV) (the first time: a few minutes, about 1.5 GB) =="
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
	@echo "== $(VENV) is ready: source $(BIN)/activate, then 'nexa doctor' =="

train: $(STAMP)  ## train the quickstart: real text, loss plot, text sample; a few minutes on 2 CPU cores
	@echo "== training +exp=$(RUN) into runs/$(RUN); Ctrl-C saves, 'make train' again goes on =="
	$(BIN)/python train.py +exp=$(RUN)

test: $(STAMP)  ## all tests but the slow grids, JOBS=2 at a time
	$(BIN)/python -m pytest -m 'not slow' -n $(JOBS) --dist worksteal

grid: $(STAMP)  ## every layout against one process; rewrites the table of docs/parallelism.md; a quarter of an hour on 2 cores
	$(BIN)/python -m tests.dist.grid --write docs/parallelism.md

lint: $(STAMP)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove .venv and caches; runs stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
