# Development tasks. Requires python3, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# More than the cores: tests wait for processes. Each worker costs the time to collect all tests.
WORKERS ?= $(shell echo $$((2 * $$(getconf _NPROCESSORS_ONLN) + 1)))
# Keep the tests of a module together, so that its fixtures are created once.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
# Keep byte code: otherwise each worker compiles all tests.
export PYTHONDONTWRITEBYTECODE =

.PHONY: help install demo test test-quick test-extended test-sandboxes test-clis crash chaos machines bench schema lint types imports check clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## create .venv with the package and the development tools

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.x")'
	@echo 'installing council and its dependencies into $(VENV); once only, can take a minute' >&2
	@$(PYTHON) -m venv $(VENV) || { echo "no venv: install your system's python3-venv package" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable . --group dev
	@touch $@

demo: install  ## run configs/quickstart.yaml on a clone of this repository and verify the results; STORE=postgres or redis starts a server
	@$(if $(STORE),$(BIN)/python -m tests.temporary_store $(STORE) --) $(BIN)/python examples/demo.py

test: install  ## run the tests of every feature, in a few minutes
	@$(PYTEST) -m 'not extended and not slow and not clis'

test-quick: install  ## run the unit, contract and property tests, in less than a minute
	@$(PYTEST) -m 'not extended and not slow and not clis' tests/unit tests/contract tests/property

test-extended: install  ## run the remaining tests: variants and injected faults, some minutes more; SHORT=1: one parameter of each
	@$(PYTEST) -m 'extended and not slow and not clis$(if $(SHORT), and not further_parameters)'

test-sandboxes: install  ## run the sandbox tests without bubblewrap, without Landlock, and without both
	@for missing in bubblewrap landlock 'bubblewrap landlock'; do \
		echo "without $$missing:"; \
		$(BIN)/python -m tests.without_sandbox $$missing -- \
			$(PYTEST) -m 'sandbox and not slow' || exit 1; \
	done

test-clis: install  ## run the tests with real CLIs, which it installs in .clis; CLIS="claude-code codex" selects some, LATEST=1 the newest
	@CLIS='$(CLIS)' LATEST='$(LATEST)' $(BIN)/python -m tests.clis.install
	@CLIS='$(CLIS)' $(PYTEST) -m 'clis$(if $(SHORT), and not extended)' --durations=20 tests/clis

crash: install  ## run the long crash tests: every failpoint, random times, kills during recovery
	@$(PYTEST) -m slow
	@COUNCIL_ALL_EXAMPLES=1 $(PYTEST) -m 'hypothesis and not slow'

machines: export COUNCIL_HISTORIES ?= 10
machines: install  ## run three machines that share a remote and a store, under losses, suspensions and outages
	@$(PYTEST) -m '' tests/crash/test_machines.py tests/crash/test_machine_histories.py

chaos: export CHAOS_TRIALS ?= 3
chaos: install  ## run random work under random kills, pauses, full disks and user commits; CHAOS_TRIALS=300 CHAOS_SEED=1
	@$(PYTEST) -m slow tests/crash/test_chaos.py

schema: install  ## regenerate configs/council.schema.json from the models of the file and the adapters
	@$(BIN)/council schema > configs/council.schema.json

bench: install  ## benchmark start-up, scheduler, locks, worktrees and the whole cycle against baselines; also writes build/bench.md
	@$(BIN)/python -m benchmarks

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: install
	@$(BIN)/mypy

imports: install
	@$(BIN)/lint-imports

check: lint types imports test  ## run lint, types, import rules and tests before a commit; CI runs `.ci/run`

clean:  ## remove generated files
	rm -rf $(VENV) .clis .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
