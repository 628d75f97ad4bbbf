# make demo    everything once on simulated data: folder demo/ with a report to open in a browser (goes on where it stopped)
# make test    formatting, lint, types, import layers and all tests (with Chromium, which it installs on Debian and Ubuntu)
# make mutants whether the tests notice broken formulas and guards: docs/mutants.md (half an hour; goes on where it stopped)
# make docs    write the generated pages of docs/ again
# make clean   remove what these targets made, the environment included (results in demo/ stay)
#
# Each target first makes the environment .venv when it is missing or pyproject.toml or constraints.txt have changed.
# PYTHON=/path/to/python names the interpreter to use; otherwise the first one that is 3.11 or newer.

.DEFAULT_GOAL := help
.PHONY: help demo test mutants docs clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?=

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

demo: $(STAMP)
	$(BIN)/aldm demo --out demo

test: $(STAMP)
	bash .ci/find-chromium
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -m "not slow" --numprocesses 2 --dist loadgroup
	$(BIN)/pytest -m slow

mutants: $(STAMP)
	$(BIN)/python tests/mutants/run.py

docs: $(STAMP)
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	python="$$(bash .ci/find-python "$(PYTHON)")" && "$$python" -m venv $(VENV)
	$(BIN)/python -m pip install --editable '.[dev]' --constraint constraints.txt
	touch $(STAMP)
