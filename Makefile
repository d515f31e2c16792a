export PYTHONSAFEPATH = 1
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Whatever the environment was made for, these say what it holds.
RUNTIME = $(VENV)/.runtime
DEV = $(VENV)/.dev

# The checkout under the package's name, for a Python that the package is not installed in.
LINK = $(CURDIR)/build/link

.PHONY: serve dev check test test-gpu bench bench-gpu eval soak

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

# Whole files per process: what fixtures share is made once. Those with slow tests come first.
test: $(DEV)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# With the Python that is there: which build of torch drives the GPU is not ours to choose.
test-gpu: $(LINK)
	PYTHONPATH=$(LINK) $(PYTHON) -m pytest -m gpu

bench: $(DEV)
	$(BIN)/python -m kvfold.bench.decode --out bench/results/decode-cpu.json
	$(BIN)/python -m kvfold.bench.kv --out bench/results/kv-cpu.json
	$(BIN)/python -m kvfold.bench.kv --tokens 32768 --head-dim 64 --layers 4 --setting dense \
		--setting "shadowkv budget=512" --setting "shadowkv budget=1024" --setting shadowkv \
		--out bench/results/kv-32k-cpu.json
	$(BIN)/python -m kvfold.bench.seal --out bench/results/seal-cpu.json

bench-gpu: $(LINK)
	PYTHONPATH=$(LINK) $(PYTHON) -m kvfold.bench.kernels --out bench/results/kernels-cuda.json
	PYTHONPATH=$(LINK) $(PYTHON) -m kvfold.bench.decode --device cuda --shape llama-3.1-8b \
		--concurrency 1 8 15 16 17 32 64 --input-len 1024 --out bench/results/decode-cuda.json
	PYTHONPATH=$(LINK) $(PYTHON) -m kvfold.bench.kv --device cuda --dtypes bfloat16 \
		--out bench/results/kv-cuda.json

# About three quarters of an hour on two idle cores.
eval: $(DEV)
	$(BIN)/python -m kvfold.eval.needle --out bench/results/needle-cpu.json
	$(BIN)/python -m kvfold.eval.needle --kinds single multikey variable common --n 40 \
		--setting dense --setting "shadowkv budget=512" --setting "shadowkv budget=512 chunk=4" \
		--setting "shadowkv budget=256 chunk=4 outliers=96" \
		--setting "shadowkv budget=128 chunk=4 outliers=96" \
		--out bench/results/needle-shadowkv-cpu.json

# Five minutes for each of seven caches.
soak: $(DEV)
	$(BIN)/python -m kvfold.bench.soak --out bench/results/soak-cpu.json

$(LINK):
	mkdir -p $@ && ln -sfn $(CURDIR) $@/kvfold
