# make demo        everything once on simulated data: folder demo/ with a report to open in a browser (goes on where it stopped)
# make test        formatting, lint, types, import layers, the quick tests and one of each kind of slow ones (about 6 minutes)
# make test-all    formatting, lint, types, import layers, all tests but those of the image (about 16 minutes)
# make test-image  the tests of the container image, which install everything from scratch (gigabytes of downloads)
# make browser     a Chromium for the tests of the service's page, which are skipped without one
# make mutants     whether the tests notice broken formulas and guards: docs/mutants.md (goes on where it stopped)
# make gpu-check   speed, memory and results on a machine with a GPU: tests/gpu/README.md (7 minutes; without a GPU it tests itself)
# make check-real  real heads through prepare and translate: make check-real DIR=FOLDER (tests/check_real.py says what lies there)
# make default-model  build the built-in model from scratch: make default-model DIR=FOLDER (about three hours on two cores)
# make docs        write the generated pages of docs/ again, and the site with the API: site/index.html
# make clean       remove what these targets made, the environment included (results in demo/ stay)
#
# Each target first makes the environment .venv when it is missing or pyproject.toml or constraints.txt have changed. None but
# browser, as root, installs anything into the system. PYTHON=/path/to/python names the interpreter to use, otherwise the first
# that is 3.11 to 3.13; TORCH_INDEX the package index of torch (see .ci/make-environment). The tests need Linux.

.DEFAULT_GOAL := help
.PHONY: help demo lint test test-all test-image browser mutants gpu-check check-real default-model docs clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
REPORTS := .reports
PYTEST := $(BIN)/pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder
PYTHON ?=

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

demo: $(STAMP)
	$(BIN)/aldm demo --out demo

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(PYTEST) -m "not slow or smoke" --junitxml $(REPORTS)/test.xml

test-all: lint
	$(PYTEST) -m "not image" --junitxml $(REPORTS)/test-all.xml

test-image: $(STAMP)
	$(BIN)/pytest -m image --junitxml $(REPORTS)/test-image.xml

browser: $(STAMP)
	bash .ci/install-browser $(CURDIR)/$(BIN)/python

mutants: $(STAMP)
	$(BIN)/python tests/mutants/run.py

gpu-check: # with the Python that is there: such a machine has no network
	PYTHONPATH=. $(or $(PYTHON),$(wildcard $(BIN)/python),python3) tests/gpu

check-real: $(STAMP)
	$(BIN)/python tests/check_real.py "$(DIR)"
	$(BIN)/python tests/real_heads.py "$(DIR)"
	$(BIN)/python tests/corruption_costs.py "$(DIR)"

default-model: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash aldm/default_model/make.sh "$(DIR)"

docs: $(STAMP)
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/layers.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache $(REPORTS)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	bash .ci/make-environment $(VENV) "$(PYTHON)"
