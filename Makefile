# Two commands do everything on a fresh machine: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow lint bench bench-micro clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lint]'
	touch $(STAMP)

demo: $(STAMP)            ## train, kill, resume, compare, draw: the main job on real text
	$(BIN)/asyncckpt demo --out demo-run

test: $(STAMP)            ## the fast suite
	$(BIN)/python -m pytest

test-slow: $(STAMP)       ## the long tests
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)            ## style, types and the layer rule
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)           ## the table of the README, on this machine (about 20 minutes, 6 GB of disk)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt '.[peers]'
	$(BIN)/python -m benchmarks

bench-micro: $(STAMP)     ## pytest-benchmark: hashes, copies, layout, manifest
	$(BIN)/python -m pytest -m bench benchmarks

clean:
	rm -rf $(VENV) demo-run bench-out .mypy_cache .ruff_cache .pytest_cache
