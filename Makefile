# `make demo` and `make test` need Python >= 3.11 and nothing else; they make .venv themselves.
PYTHON ?= $(shell for name in python3.11 python3 python3.12 python3.13 python3.14; do \
  if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
    echo $$name; break; fi; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BASE_STAMP := $(VENV)/.installed-base
APP_STAMP := $(VENV)/.installed-app

# The theme's note on its own future is not a warning about these pages.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs

.PHONY: help app demo test test-app check pytest docs format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer must be installed; none was found.\
	 Run: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@echo "== making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# A stamp older than pyproject.toml installs again; pip then fetches only what is missing.
$(BASE_STAMP): pyproject.toml | $(BIN)/python
	@echo "== installing the package: downloads about 3 GB (torch is most of it), 1 to 5 minutes"
	@$(BIN)/python -m pip install --progress-bar on -e .
	@touch $@

$(STAMP): pyproject.toml | $(BIN)/python
	@echo "== installing the package and the development tools: downloads about 3 GB (torch is most"
	@echo "   of it), 1 to 5 minutes"
	@$(BIN)/python -m pip install --progress-bar on -e ".[dev,data,docs]"
	@touch $@ $(BASE_STAMP)

$(APP_STAMP): pyproject.toml $(STAMP)
	@echo "== installing the demo page (gradio) and what drives a browser: about 80 MB"
	@$(BIN)/python -m pip install --progress-bar on -e ".[ui,browser]"
	@touch $@

app: $(APP_STAMP) ## draw, read, invent and inpaint on a page in the browser
	@$(BIN)/python -m multimodal_dlm app

demo: $(BASE_STAMP) ## draw, inpaint, caption and answer with the released model
	@$(BIN)/python -m multimodal_dlm demo

test: $(STAMP) check pytest ## every check and every test

check: $(STAMP) ## style, types, layers, documentation
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== import-linter"
	@$(BIN)/lint-imports --no-logo
	@echo "== pyright (about half a minute)"
	@$(BIN)/pyright
	@echo "== mkdocs"
	@$(MKDOCS) build

pytest: $(STAMP) ## the tests
	@echo "== pytest (a few minutes on two cores)"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test-app: $(APP_STAMP) ## the page in a headless Chromium (Debian: chromium chromium-driver)
	@echo "== pytest: the page in Chromium (half a minute); screenshots in out/app"
	@$(BIN)/python -m pytest tests/app/check_browser.py

docs: $(STAMP) ## read the documentation in a browser, built again at every change
	@$(MKDOCS) serve

format: $(STAMP) ## let ruff repair what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove the environment and all outputs
	rm -rf $(VENV) out runs build *.egg-info .pytest_cache .ruff_cache .import_linter_cache
