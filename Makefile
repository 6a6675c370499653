# make help
# PYTHON is the interpreter the virtual environment is made from (3.11 or newer). On a CPU machine, unless pip finds CPU
# wheels of torch by itself: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
# How many test files run at a time.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SCRIPTS := $(wildcard launch/*.sh launch/*.sbatch) .ci/run

# What is compiled or downloaded on the way stays in the project.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions
export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/.cache/inductor
export TRITON_CACHE_DIR ?= $(CURDIR)/.cache/triton
export MPLCONFIGDIR ?= $(CURDIR)/.cache/matplotlib
export HF_HOME ?= $(CURDIR)/.cache/huggingface
export WANDB_CACHE_DIR ?= $(CURDIR)/.cache/wandb

.PHONY: help setup demo test test-all lint dist clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(STAMP) ## make .venv and install MegaSora into it, editable

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup ## the whole road on real video: clips, shards, VAE, latents, training, sampling
	launch/demo.sh

test test-all: export OMP_NUM_THREADS = 1

test: setup ## the tests, without the long cases; what was skipped, and why, is listed at the end
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not long"

test-all: setup ## the tests with the full matrices
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

lint: setup ## ruff, mypy, bandit, shellcheck, hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit -q -c pyproject.toml -r megasora data_pipelines kernels
	$(BIN)/shellcheck -x $(SCRIPTS)
	$(BIN)/hadolint Dockerfile

dist: setup ## build the sdist and the wheel into dist/; nothing is uploaded
	rm -rf build dist
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build --no-isolation

clean: ## remove caches and build output; .venv, data/ and runs/ stay
	rm -rf .cache .pytest_cache .mypy_cache .ruff_cache build dist ./*.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
