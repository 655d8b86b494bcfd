# Needs Python 3.11 or later and make. The first target that is run makes the environment, with uv where it is installed.
#   make PYTHON=python3.12 test      another interpreter
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python -m
# Names the interpreter, so that asking for another one makes the environment again.
STAMP = $(VENV)/installed-$(subst /,-,$(PYTHON))

ifneq ($(wildcard ../shared/data),)
export PONDER_DATA ?= $(abspath ../shared/data)
endif
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache

# Runs at a time: two where there are two cores. nproc knows the cores that we are bound to; not every system has it.
JOBS ?= $(shell cores=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); echo $$((cores < 2 ? cores : 2)))

.PHONY: help train table test test-all lint format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

train: $(STAMP)  ## train one model on addition; run it again to go on
	$(RUN) ponder.train --config=experiments/addition.py --workdir=runs/addition

table: $(STAMP)  ## fixed depths, ACT and PonderNet on addition, as a table
	$(RUN) ponder.ablate --config=experiments/addition.py --output=runs/table --seeds=1 --jobs=$(JOBS)

test: $(STAMP)  ## the tests, save the slow ones
	$(RUN) pytest -n 2 -m "not slow"

test-all: $(STAMP)  ## all tests
	$(RUN) pytest -n 2

lint: $(STAMP)  ## style, types, shell scripts
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy
	$(VENV)/bin/shellcheck .ci/run $(wildcard tpu/*.sh)

format: $(STAMP)  ## mend the style
	$(RUN) ruff check --fix
	$(RUN) ruff format

clean:  ## remove the environment and the caches, not the runs
	rm -rf $(VENV) .venv-newest .jax_cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "ponder needs Python 3.11 or later, $(PYTHON) is not: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@if [ "$$($(VENV)/bin/python -V 2>/dev/null)" != "$$($(PYTHON) -V)" ]; then rm -rf $(VENV); fi
	@echo "Installing into $(VENV)"
	@if uv --version >/dev/null 2>&1; then \
	  uv venv -q --allow-existing --python "$$(command -v $(PYTHON))" $(VENV) && \
	  uv pip install -q --python $(VENV)/bin/python -c constraints.txt -e '.[dev]'; \
	else \
	  $(PYTHON) -m venv $(VENV) && \
	  $(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[dev]'; \
	fi
	@touch $@
