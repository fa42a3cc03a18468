# make help lists the targets. Every target sets itself up: one local .venv, one install, reused afterwards.
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.stamp
ARGS ?=
OFFLINE := HF_HUB_OFFLINE=1
TEST := $(OFFLINE) OMP_NUM_THREADS=1 $(PY) -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup install demo test slow lint types bench results toys golden mutate clean

help:  ## this list
	@echo "make TARGET [ARGS='more arguments'] [PYTHON=python3.12, for the first setup]"
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-10s %s\n", $$1, $$2 }'

# The stamp is a copy of what was installed from, so a fresh checkout beside an installed .venv stays off the network;
# the second check links a checkout that has moved, or has a new package, anew (also without the network).
setup:  ## make .venv and install everything once; later runs only check
	@cat setup.cfg pyproject.toml | cmp -s - $(STAMP) || $(MAKE) --no-print-directory install
	@cd / && '$(CURDIR)/$(PY)' -I -c "from importlib.util import find_spec as f; from os.path import samefile; \
	assert all(samefile(f(p).submodule_search_locations[0], '$(CURDIR)/' + p) for p in ('distill', 'pipelines', 'eval'))" \
	2>/dev/null || { cd '$(CURDIR)' && echo 'setup: linking this checkout into .venv' && \
	$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .; }

install:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo 'setup: Python 3.11 or newer is needed; "$(PYTHON)" is' "$$($(PYTHON) --version 2>&1)."; \
	  echo '       Name another one: PYTHON=python3.12 make setup'; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	{ echo 'setup: "$(PYTHON)" has no venv module. On Debian or Ubuntu: apt install python3-venv'; exit 1; }
	@test -x .venv/bin/pip || { echo 'setup: creating .venv'; $(PYTHON) -m venv .venv; }
	@echo 'setup: installing what setup.cfg lists into .venv (once; torch is large: some minutes and gigabytes)'
	@$(PY) -m pip install --disable-pip-version-check -e '.[dev]'
	@cat setup.cfg pyproject.toml > $(STAMP)
	@echo 'setup: done'

demo: setup  ## the main job on digits: teacher, one-step students, evaluation, export, runs/demo/index.html
	@$(OFFLINE) $(PY) recipes/digits_demo.py $(ARGS)

test: setup  ## the tests, without the slow ones
	@echo 'test: all tests but the slow ones, offline, one thread'
	@$(TEST) -m 'not slow' $(ARGS)

slow: setup  ## the slow tests: toy science, whole runs
	@$(TEST) -m slow $(ARGS)

lint: setup  ## ruff: rules and format
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

types: setup  ## mypy over distill, pipelines, eval
	@$(PY) -m mypy

bench: setup  ## time of a step over the time of its network calls, and peak memory
	@$(OFFLINE) $(PY) benchmarks/digits.py $(ARGS)

results: setup  ## the table of the digits over seeds, with intervals (long)
	@$(OFFLINE) $(PY) benchmarks/results.py $(ARGS)

toys: setup  ## the table of the toys: each method on each schedule
	@$(OFFLINE) $(PY) benchmarks/toys.py $(ARGS)

golden: setup  ## the authors' own numbers, reproduced
	@$(TEST) -v tests/test_golden*.py $(ARGS)

mutate: setup  ## break each method on purpose; show the test that notices
	@$(OFFLINE) OMP_NUM_THREADS=1 $(PY) tests/mutate.py $(ARGS)

clean:  ## remove caches and build products (.venv and runs/ stay)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
