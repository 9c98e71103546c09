# Every target does its own set-up: on a fresh machine `make demo` or `make test` is all there is to type.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
COMPILED := $(VENV)/.compiled
PIP := $(BIN)/python -m pip --disable-pip-version-check
SHELL := /bin/bash
# Modules are compiled when they are first imported, not by pip, and kept, also where the environment says otherwise: a
# start that compiles PyTorch and Transformers anew takes three times as long.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup demo test pytest slurm lint bench clean
.DEFAULT_GOAL := help

help:
	@echo "make setup   make .venv with the pinned packages and this project in it"
	@echo "make demo    synthetic shards -> pretrain -> evaluate -> publish, in runs/demo"
	@echo "make test    ruff, mypy and every test"
	@echo "make lint    ruff and mypy alone"
	@echo "make bench   side by side with public peers, each figure a ratio from one run"
	@echo "make clean   remove .venv and caches; runs/ stays"

setup: $(COMPILED)

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "error: Python 3.11 to 3.13 is needed, $(PYTHON) is not; name one: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing the pinned packages"
	@$(PIP) install --quiet $$(grep '^uv==' requirements.txt)
	@$(BIN)/uv pip install --quiet --no-deps --requirements requirements.txt --python $(BIN)/python || { \
	  echo "uv could not; pip, with whatever index is configured for it, may" >&2; \
	  $(PIP) install --no-compile --no-deps --requirement requirements.txt; }
	$(BIN)/uv pip check --python $(BIN)/python
	$(BIN)/uv pip install --quiet --no-deps --no-build-isolation --editable . --python $(BIN)/python
	@touch $@

$(COMPILED): $(READY)
	$(BIN)/python -c "import mmpretrain.training.run"
	@touch $@

demo: setup
	$(BIN)/mmpretrain demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test:
	@$(MAKE) --no-print-directory -j2 lint pytest

pytest: setup slurm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The launcher is tested on a real Slurm cluster on this machine; where it cannot be installed those tests are skipped,
# and the last lines of the tests name them.
slurm:
	@PATH="$$PATH:/usr/sbin" command -v slurmctld >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm shellcheck >/dev/null; } || \
	  echo "warning: no Slurm here, and it cannot be installed (Debian and Ubuntu: apt install slurm-wlm)" >&2

# What needs a GPU runs where the machine has one.
BENCHMARKS := $(filter-out benchmarks/loader_sides.py benchmarks/machine.py $(if $(shell command -v nvidia-smi),,benchmarks/gpu.py),$(wildcard benchmarks/*.py))

bench: setup
	for benchmark in $(BENCHMARKS); do OMP_NUM_THREADS=1 $(BIN)/python $$benchmark || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
