# Everything a developer needs, on a machine that has python3, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# More than the cores of a small machine: half of a test's time is spent waiting for processes to start and end.
WORKERS ?= 6
# Neighbouring tests stay together, so that what a module prepares is prepared once.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
# Each worker would compile all tests anew where byte code is not kept.
export PYTHONDONTWRITEBYTECODE =

.PHONY: help install demo test test-extended test-sandboxes test-clis crash chaos bench schema lint types imports check clean
.DEFAULT_GOAL := help

help:  ## say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## make .venv with the package and all that developing needs

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.x")'
	@echo 'installing council and its dependencies into $(VENV); this happens once and can take a minute' >&2
	@$(PYTHON) -m venv $(VENV) || { echo "no venv: install your system's python3-venv package" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable . --group dev
	@touch $@

demo: install  ## run configs/quickstart.yaml on a clone of this repository and check what came of it
	@$(BIN)/python examples/demo.py

test: install  ## each feature in a few minutes
	@$(PYTEST) -m 'not extended and not slow and not clis'

test-extended: install  ## what `make test` leaves out: variants and faults, some minutes more
	@$(PYTEST) -m 'extended and not slow and not clis'

test-sandboxes: install  ## the tests of sandboxes as on a machine without bubblewrap, without Landlock, without both
	@for missing in bubblewrap landlock 'bubblewrap landlock'; do \
		echo "without $$missing:"; \
		$(BIN)/python -m tests.without_sandbox $$missing -- \
			$(PYTEST) -m 'sandbox and not slow' || exit 1; \
	done

test-clis: install  ## runs through real programs, which it installs in .clis; CLIS="claude-code codex" names some
	@CLIS='$(CLIS)' $(BIN)/python -m tests.clis.install
	@CLIS='$(CLIS)' $(PYTEST) -m clis --durations=20 tests/clis

crash: install  ## the long crash runs: every failpoint, random moments, kills inside recovery
	@$(PYTEST) -m slow
	@COUNCIL_ALL_EXAMPLES=1 $(PYTEST) -m 'hypothesis and not slow'

chaos: export CHAOS_TRIALS ?= 3
chaos: install  ## random work under random kills, stops, full disks and commits of the user; CHAOS_TRIALS=300 CHAOS_SEED=1
	@$(PYTEST) -m slow tests/crash/test_chaos.py

schema: install  ## bring configs/council.schema.json up to date with the file's models and the adapters
	@$(BIN)/council schema > configs/council.schema.json

bench: install  ## measure start-up, the scheduler, locks, worktrees and the whole cycle beside baselines; the table goes to build/bench.md, too
	@$(BIN)/python -m benchmarks

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: install
	@$(BIN)/mypy

imports: install
	@$(BIN)/lint-imports

check: lint types imports test  ## what to run before a commit; CI runs `.ci/run`

clean:  ## remove what `make` made
	rm -rf $(VENV) .clis .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
