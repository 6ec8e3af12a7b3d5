# Everything runs in .venv, made from pyproject.toml with the versions in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PORT ?= 8000
# Tests run in several processes; files stay together, as their fixtures are shared.
PARALLEL ?= --numprocesses auto --maxprocesses 4 --dist loadfile
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help env demo test test-all check docs page format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

env: $(STAMP)  ## the environment alone

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	@touch $@

demo: $(STAMP)  ## serve the demo model and its adapters, show what they do, keep serving (CHECK=1: stop after showing)
	$(BIN)/vblora-serve demo --port $(PORT) $(if $(CHECK),--check)

check: $(STAMP)  ## lint, types, layering, unit tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PARALLEL) tests/unit

test: $(STAMP)  ## everything but image builds and long soaks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PARALLEL) -m 'not heavy'

test-all: $(STAMP)  ## what make test leaves out: image builds and long soaks
	$(BIN)/python -m pytest -m heavy --timeout 1800

docs: $(STAMP)  ## the documentation as a site, in build/site
	$(BIN)/mkdocs build --strict --quiet

page: $(STAMP)  ## build the page that the server shows, from service/web into service/web/dist
	$(BIN)/python -m tests.page_build

format: $(STAMP)  ## put the code in its format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and what tests left
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
