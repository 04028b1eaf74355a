# make bench: environment, benchmarks sized for this machine, report.   make test: environment, tests.
# make nightly: the tests that take minutes.   make lint: style and types.
# Options: PYTHON=python3.12, PROFILE=quick|default|full, DEVICE=cpu|cuda.

PYTHON ?= python3
PROFILE ?= quick
VENV ?= .venv
BIN := $(VENV)/bin
# Tests run one process a core; each then computes with one thread.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: bench test nightly lint clean

bench: $(VENV)/.installed
	$(BIN)/python -m pytest benchmarks/ --benchmark-only --densebench-profile $(PROFILE) \
		$(if $(DEVICE),--densebench-device $(DEVICE))
	$(BIN)/python -m densebench.report

test: $(VENV)/.installed
	$(BIN)/python -m pytest tests/ -n $(WORKERS) --dist worksteal -q

# What takes minutes: tests marked so.
nightly: $(VENV)/.installed
	$(BIN)/python -m pytest tests/ -n $(WORKERS) --dist worksteal -q -m nightly

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,peers]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,peers,dev]'
	touch $@
