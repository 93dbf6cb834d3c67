# make demo   sets everything up in .venv and prunes the built-in pipeline
# make test   sets everything up in .venv and runs the tests
# make check  the developer's loop: formatting, types, tests

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check format setup clean

demo: setup
	$(BIN)/compressor run recipes/quickstart.yaml --overwrite

test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("compressor needs Python 3.11 or newer, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv out build dist
