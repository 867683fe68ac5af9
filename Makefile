# Every target does its own set-up; `make setup PYTHON=/path/to/python3.12` names an interpreter.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full check format lint types lock clean

# uv trusts the system's certificates where it has any: behind a proxy with a certificate of its own they are the right ones.
ifneq ($(wildcard /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/ca-bundle.pem),)
export UV_SYSTEM_CERTS ?= 1
endif

BIN := .venv/bin
PATHS := megatron_dgrpo tests tools
# Arguments of pytest: make test ARGS="tests/config -k unknown"
ARGS =

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

setup: ## make .venv with the locked packages for CPU (once; later calls find nothing to do)
	@tools/setup.sh

demo: setup ## train a tiny teacher and student, then dGRPO with a real vLLM engine, within 10 minutes on 2 cores
	@$(BIN)/dgrpo demo

test: setup ## all tests but the long ones
	@$(BIN)/python -m pytest -m "not long" $(ARGS)

test-full: setup ## all tests
	@$(BIN)/python -m pytest $(ARGS)

check: lint types test ## format, lint, types, tests

lint: setup ## is the code formatted, and free of lint?
	@$(BIN)/ruff format --check $(PATHS)
	@$(BIN)/ruff check $(PATHS)

types: setup ## do the types fit?
	@$(BIN)/mypy megatron_dgrpo $(wildcard tools/*.py tools/*/*.py)

format: setup ## format the code and fix what lint can fix
	@$(BIN)/ruff check --fix --quiet $(PATHS) || true
	@$(BIN)/ruff format $(PATHS)

# Locks name versions and hashes, never an index. Pins are kept where they still fit: make lock ARGS=--upgrade takes the newest.
LOCK := $(BIN)/uv pip compile --no-config --quiet --python-version 3.12 --python-platform x86_64-manylinux_2_28 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" $(ARGS)

lock: setup ## write the locks under requirements/ again from pyproject.toml
	@$(LOCK) requirements/bootstrap.in -o requirements/bootstrap.txt >/dev/null
	@$(LOCK) pyproject.toml --extra cpu --extra dev --overrides requirements/cpu-overrides.txt \
		-o requirements/cpu-linux-x86_64.txt >/dev/null
	@$(LOCK) pyproject.toml --extra gpu --extra dev -o requirements/gpu-linux-x86_64.txt >/dev/null
	@$(LOCK) pyproject.toml --extra launch -o requirements/launch-linux-x86_64.txt >/dev/null
	@! grep -nE '://|--(extra-)?index-url|--find-links' requirements/*-linux-*.txt requirements/bootstrap.txt

clean: ## remove the environment, caches and builds; runs/ stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
	find megatron_dgrpo tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
