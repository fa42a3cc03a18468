# make help lists the targets. Every target sets itself up: one local .venv, one install, reused afterwards.
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.stamp
ARGS ?=
OFFLINE := HF_HUB_OFFLINE=1
TEST := $(OFFLINE) OMP_NUM_THREADS=1 $(PY) -m pytest
SAME := tests/golden tests/distill/test_invariants.py tests/distill/training/test_resume.py tests/distill/training/test_processes.py

.DEFAULT_GOAL := help
.PHONY: help setup install demo test same slow lint types bench sdxl gpu results toys faults tables golden mutate clean

help:  ## this list
	@echo "make TARGET [ARGS='more arguments'] [PYTHON=python3.12, for the first setup]"
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-10s %s\n", $$1, $$2 }'

# The stamp is a copy of what was installed from; the second check notices a checkout that has moved or has a new package.
# Where .venv already holds everything, installing only links the checkout and stays off the network.
setup:  ## make .venv and install everything once; later runs only check
	@cat setup.cfg setup.py pyproject.toml | cmp -s - $(STAMP) && (cd / && '$(CURDIR)/$(PY)' -I -c "$$LINKED") 2>/dev/null \
	|| $(MAKE) --no-print-directory install

define LINKED
from importlib.util import find_spec
from os.path import samefile
for room in ("distill", "pipelines", "eval", "recipes"):
    assert samefile(find_spec(room).submodule_search_locations[0], "$(CURDIR)/" + room)
endef
export LINKED

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo 'setup: Python 3.11 or newer is needed; "$(PYTHON)" is' "$$($(PYTHON) --version 2>&1)."; \
	  echo '       Name another one: PYTHON=python3.12 make setup'; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	{ echo 'setup: "$(PYTHON)" has no venv module. On Debian or Ubuntu: apt install python3-venv'; exit 1; }
	@echo 'setup: creating .venv'
	@$(PYTHON) -m venv .venv

install: .venv/bin/pip
	@if $(PY) -m pip install --quiet --no-index --no-build-isolation -e '.[dev]' 2>/dev/null; then \
	  echo 'setup: linked this checkout into .venv, which holds all that it needs'; \
	else \
	  echo 'setup: installing what setup.cfg lists into .venv (once; torch is large: some minutes and gigabytes)'; \
	  $(PY) -m pip install --disable-pip-version-check -e '.[dev]' && echo 'setup: done'; \
	fi
	@cat setup.cfg setup.py pyproject.toml > $(STAMP)

demo: setup  ## the main job on digits: teacher, one-step students, evaluation, export, runs/demo/index.html
	@$(OFFLINE) $(PY) recipes/digits_demo.py $(ARGS)

test: setup  ## the tests, without the slow ones
	@echo 'test: all tests but the slow ones, offline, a file at a time on each of up to four cores'
	@$(TEST) -m 'not slow' -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

same: setup  ## what a refactor must not change: golden numbers, stored losses, resume bit for bit, two processes as one
	@$(TEST) -m 'not slow' -n logical --maxprocesses 2 --dist loadfile $(SAME) $(ARGS)

slow: setup  ## the slow tests: toy science, whole runs
	@$(TEST) -m slow $(ARGS)

lint: setup  ## ruff: rules and format
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

types: setup  ## mypy over distill, pipelines, eval
	@$(PY) -m mypy

bench: setup  ## time of a step over the time of its network calls, and peak memory
	@$(OFFLINE) $(PY) benchmarks/digits.py $(ARGS)

sdxl: setup  ## time and memory of SDXL's steps on this GPU; ARGS=--tiny runs a narrow network anywhere
	@$(OFFLINE) $(PY) -m benchmarks.sdxl $(ARGS)

gpu: setup  ## ten minutes on this GPU, the most important first: docs/gpu.md; ARGS=--tiny rehearses on a CPU
	@$(OFFLINE) $(PY) -m benchmarks.gpu $(ARGS)

results: setup  ## the table of the digits over seeds, with intervals (long)
	@$(OFFLINE) $(PY) benchmarks/results.py $(ARGS)

toys: setup  ## the table of the toys: five methods on each schedule
	@$(OFFLINE) $(PY) benchmarks/toys.py $(ARGS)

faults: setup  ## 200 kills, damaged checkpoints, full disks: every run ends as the undisturbed one (long)
	@$(OFFLINE) $(PY) tests/support/campaign.py --output docs/endurance.md $(ARGS)

tables: setup  ## write the tables of docs/ that are made from the code: methods, recipes, families
	@DISTILL_WRITE=1 $(TEST) -q tests/test_methods.py tests/test_readme.py tests/recipes/test_matrix.py tests/pipelines/test_plan.py -k "page or table" $(ARGS)

golden: setup  ## the authors' own numbers, reproduced
	@$(TEST) -v tests/golden $(ARGS)

mutate: setup  ## break methods on purpose, ARGS=sid this one; show the test that notices (long)
	@$(OFFLINE) OMP_NUM_THREADS=1 $(PY) tests/mutation $(ARGS)

clean:  ## remove caches and build products (.venv and runs/ stay)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
