# make help lists the targets. Everything runs in .venv, which any target sets up when it must.

VENV := .venv
PY := $(VENV)/bin/python

# MLX needs exactly one backend on Linux: cuda13 where an NVIDIA driver answers, else cpu. macOS
# needs none. Choose yourself with make setup BACKEND=cpu
ifeq ($(shell uname -s),Darwin)
BACKEND ?= none
else
BACKEND ?= $(shell nvidia-smi >/dev/null 2>&1 && echo cuda13 || echo cpu)
endif
comma := ,
EXTRAS := dev$(if $(filter-out none,$(BACKEND)),$(comma)$(BACKEND))
STAMP := $(VENV)/.setup-$(BACKEND)
# PyTorch, transformers' models and PEFT, which only the tests against them need.
PARITY := $(VENV)/.parity
# Locust, whose clients ask the service in a benchmark.
BENCH := $(VENV)/.bench

# Processes that share the tests.
JOBS ?= 2
TESTS := $(PY) -m pytest -q -n $(JOBS) --dist loadgroup

# Words after the command, as in make run ARGS='+experiment=dry_run'
ARGS ?=

# Some environments forbid to write bytecode; then each of the some hundred processes of the tests
# would compile the whole package anew, which takes it a second.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup run test test-all parity check bench

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## build .venv with the one MLX backend this machine needs

$(STAMP): pyproject.toml constraints.txt
	@# Two backends in one environment overwrite each other, so a change of mind starts afresh.
	@if ls $(VENV)/.setup-* >/dev/null 2>&1 && [ ! -e $@ ]; then rm -rf $(VENV); fi
	@if [ ! -x $(PY) ]; then \
	  for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	      found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then echo "Python 3.11 or newer is needed, and none is on the PATH" >&2; exit 1; fi; \
	  echo "building $(VENV) with $$found, MLX backend: $(BACKEND)"; \
	  $$found -m venv $(VENV); \
	fi
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

run: setup ## the whole main job on the embedded sample (ARGS='key=value …' for more)
	$(PY) -m mondrian_ft $(ARGS)

test: setup ## the everyday tests, some minutes
	$(TESTS) -m 'not full' $(ARGS)

test-all: $(PARITY) ## every test; installs the extra parity, fails (never skips) without Chromium
	MONDRIAN_FT_TEST_ALL=1 $(TESTS) $(ARGS)

parity: $(PARITY) ## the tests against PyTorch, transformers and PEFT, installed into .venv for them
	MONDRIAN_FT_TEST_ALL=1 $(PY) -m pytest -q tests/parity $(ARGS)

$(PARITY): $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS),parity]'
	@touch $@

$(BENCH): $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS),bench]'
	@touch $@

check: setup ## format, lint, types and the fast tests, under a minute
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright
	$(PY) -m pytest -q -x -m 'not full and not slow'

bench: $(BENCH) ## ours beside mlx-vlm's and other figures: prints ratios, writes benchmarks/results
	$(PY) -m benchmarks $(ARGS)
