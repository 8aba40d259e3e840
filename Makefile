# `make demo` and `make test` need only Python 3.11+ and make; both build .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-

.PHONY: demo test lint clean

demo: $(STAMP)demo
	$(BIN)/kroncc apply recipes/quickstart.yaml

test: $(STAMP)test
	$(BIN)/python -m pytest -n auto

lint: $(STAMP)test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP)demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo]'
	@touch $@

$(STAMP)test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo,test]'
	@touch $@

clean:
	rm -rf $(VENV) runs
