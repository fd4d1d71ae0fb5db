# `make chat` and `make test` each do all the set-up on a fresh machine, then run.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: chat test lint clean help

help:
	@echo "make chat   open the chat with the embedded model (or: echo 'question' | make chat)"
	@echo "make test   ruff, mypy and the tests"
	@echo "make clean  remove the virtual environment"

chat: $(VENV)/.runtime
	@$(BIN)/dsv4 chat tiny

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)

# Set-up reads nothing from stdin and writes to stderr: stdin is the chat's question, stdout its answer.
$(BIN)/python:
	@echo "Setting up $(VENV) (once; a few minutes)..." >&2
	@$(PYTHON) -m venv $(VENV) >&2 </dev/null

$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	@$(PIP) install -c constraints.txt -e . >&2 </dev/null
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	@$(PIP) install -c constraints.txt -e ".[test]" >&2 </dev/null
	@touch $@ $(VENV)/.runtime
