# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
#
# Every target does its own set-up; the second time that takes no time.

VENV ?= .venv
PY := $(VENV)/bin/python
ARGS ?=
EXTRAS ?=
# The whole suite: whole files go to two processes of pytest, in the order of test/conftest.py. With
# Ray's they have taken 8.7 GB at most; where less than 10 is available, one process runs all.
PARALLEL = $(shell awk '/^MemAvailable/ && $$2 > 10e6 \
  {print "-n 2 --dist loadfile --no-loadscope-reorder"}' /proc/meminfo)

export VENV PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup doctor train quick cluster test test-gpu lint format docs bench bench-gpu results pins clean distclean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1|/' | awk -F '|' '{printf "%-20s%s\n", $$1, $$2}'
	@echo
	@echo "  ARGS='...' is handed on:  make train ARGS='seed=1'    make test ARGS='-k admission'"
	@echo "  EXTRAS=maniskill also installs ManiSkill and a Vulkan driver for it:  make setup EXTRAS=maniskill"

setup: ## make .venv with the pinned packages (system packages through apt where allowed)
	@bash scripts/setup.sh libero dev $(EXTRAS)

doctor: setup ## check what usually breaks, and name the remedies
	@$(PY) -m torchrl_dvla doctor $(ARGS)

train: setup ## asynchronous GRPO on LIBERO from the shipped checkpoint, at most 15 minutes
	$(PY) -m torchrl_dvla train $(ARGS)

quick: setup ## the same loop on a toy environment, under two minutes
	$(PY) -m torchrl_dvla train --quick $(ARGS)

cluster: setup ## the toy task over two nodes of Ray's on this machine; ARGS=demo.kill_node=true kills one
	$(PY) -m torchrl_dvla train --config-name toy_cluster $(ARGS)

test: setup ## the test suite and the documentation's examples
	$(PY) -m pytest $(or $(ARGS),$(PARALLEL))

test-gpu: setup ## the tests that need a GPU; skipped with the reason where there is none
	@$(PY) -m pytest -m gpu $(ARGS)

lint: setup ## ruff (lint and format), mypy, and the project's size as information
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	@$(PY) scripts/count.py

format: setup ## let ruff correct what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: ## build the documentation into docs/build/html
	@bash scripts/setup.sh libero dev docs
	$(PY) -m sphinx -q -W --keep-going -b html docs/source docs/build/html $(ARGS)
	@echo "open docs/build/html/index.html"

bench: setup ## run every benchmark but gpu.py, maniskill_env.py and peers.py; each prints one JSON object as its last line
	@set -e; for file in benchmarks/*.py; do \
	  case "$$file" in */_* | */gpu.py | */maniskill_env.py | */peers.py) continue;; esac; \
	  echo "== $$file"; $(PY) "$$file" $(ARGS); done

bench-gpu: setup ## decisions, publication and memory with learner and policy on one GPU
	$(PY) benchmarks/gpu.py $(ARGS)

results: setup ## the tables of results from docs/results; ARGS='--keep FILE' keeps a benchmark's output or a run first
	@$(PY) scripts/results.py $(ARGS)

pins: ## write requirements/constraints.txt anew from .venv, after an upgrade
	@bash scripts/pins.sh

clean: ## remove what builds, tests and tools left
	rm -rf build dist *.egg-info docs/build docs/source/reference/generated
	rm -rf docs/source/decisions docs/source/measurements
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## the same, and the virtual environment
	rm -rf $(VENV)
