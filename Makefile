export PYTHONSAFEPATH = 1
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Whatever the environment was made for, these say what it holds.
RUNTIME = $(VENV)/.runtime
DEV = $(VENV)/.dev

.PHONY: serve dev check test test-gpu bench

serve: $(RUNTIME)
	$(BIN)/kvfold serve

# Editable installs: new files are seen at once.
$(RUNTIME): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

dev: $(DEV)

$(DEV): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

# mypy reads an installed copy, so that it works whatever the clone is called.
check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf build && $(BIN)/pip install --quiet --no-deps --target build/typecheck .
	MYPYPATH=build/typecheck $(BIN)/mypy -p kvfold

test: $(DEV)
	$(BIN)/python -m pytest

test-gpu: $(DEV)
	$(BIN)/python -m pytest -m gpu

bench: $(DEV)
	$(BIN)/python -m kvfold.bench.decode --out bench/results/decode-cpu.json
