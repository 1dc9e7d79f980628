# make demo: a study through a whole node on this machine.   make test: what must hold.   make help: the rest.
# Nothing is installed outside .venv, except Debian packages for the tests (scripts/system-packages.sh), and by
# `make install` and `make uninstall`, which are for root.

PYTHON  ?= python3
VENV    ?= .venv
OUT     ?= demo-output
WORKERS ?= 2
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check
# Numerical libraries use all cores by themselves; tests run side by side and must not.
TEST_ENV := OMP_NUM_THREADS=1 TCP_NODELAY=1 PATH="$(CURDIR)/$(BIN):$$PATH"
PYTEST   := $(TEST_ENV) $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow chaos soak test-gpu check bench docs venv install uninstall system-packages clean

help:
	@echo "make demo        install into $(VENV), then run the demo into $(OUT)"
	@echo "make test        install and run the tests (DCMTK, Orthanc, dicom3tools, Chromium from Debian)"
	@echo "make test-slow   the tests that take minutes each"
	@echo "make chaos       kill -9, full disks, bad peers, clock jumps, probes: chaos-report.md"
	@echo "make soak        a million small instances, or an hour: soak-report.md"
	@echo "make test-gpu    the tests that need a CUDA device"
	@echo "make check       ruff and mypy"
	@echo "make bench       all benchmarks"
	@echo "make docs        the documentation as a site, without internet to read it: build/site/index.html"
	@echo "make venv        install into $(VENV)"
	@echo "make install     as root: system services on this machine (docs/install.md); uninstall keeps all data"
	@echo "make clean       remove $(VENV), caches and $(OUT)"

venv: $(VENV)/.installed

install:
	@PYTHON="$(PYTHON)" sh scripts/install.sh $(if $(DESTDIR),--destdir "$(DESTDIR)") \
	  $(if $(TORCH_INDEX),--torch-index "$(TORCH_INDEX)")

uninstall:
	@PYTHON="$(PYTHON)" sh scripts/install.sh --uninstall $(if $(DESTDIR),--destdir "$(DESTDIR)")

demo: $(VENV)/.installed
	$(BIN)/dicomnode demo $(OUT)

test: system-packages $(VENV)/.installed-test
	$(PYTEST) -n $(WORKERS) --dist loadfile

test-slow: system-packages $(VENV)/.installed-test
	$(PYTEST) -m slow

# CHAOS_KILLS=200, CHAOS_PROBES=10000; the report says what was counted.
chaos: system-packages $(VENV)/.installed-test
	CHAOS_REPORT=chaos-report.md $(PYTEST) tests/chaos -m chaos
	$(TEST_ENV) $(BIN)/python scripts/fuzz.py

# SOAK_INSTANCES=1000000, SOAK_MINUTES=60
soak: system-packages $(VENV)/.installed-test
	CHAOS_REPORT=soak-report.md $(PYTEST) -m soak

test-gpu: $(VENV)/.installed-test
	$(PYTEST) -m gpu

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: system-packages $(VENV)/.installed-test
	@set -e; for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "build/site/index.html; with search: $(PYTHON) -m http.server --directory build/site"

system-packages:
	@PYTHON="$(PYTHON)" sh scripts/system-packages.sh

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.11 or later is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments. Remedy: sudo apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# constraints.txt pins torch to the one build that brings no CUDA; a CUDA build of the same version that is installed
# already stays.
$(VENV)/.installed: setup.cfg constraints.txt pyproject.toml | $(VENV)/bin/python
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

# pyradiomics builds against the numpy that is there: no build isolation, and its build requirements first.
$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test,docs]' setuptools wheel
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation pyradiomics==3.0.1
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) $(OUT) .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
