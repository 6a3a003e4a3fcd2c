# make demo | test | check | docs | mutants | install: what CI calls and what the README says.
VENV   := .venv
PYTHON := $(VENV)/bin/python
PIP    := $(PYTHON) -m pip install --quiet --disable-pip-version-check
# The CPU build of torch where the index has one; a bare "torch" may pull gigabytes of CUDA packages.
TORCH  ?= torch==2.13.0

.PHONY: install test fast check demo docs mutants clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	python3 -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -e '.[demo,dev]'
	touch $@

test: install
	$(PYTHON) -m pytest -n auto

fast: install
	$(PYTHON) -m pytest -n auto -m 'not slow'

check: install
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

demo: install
	$(VENV)/bin/slimformer demo --out demo

docs: $(VENV)/.docs
	$(PYTHON) results/tables.py
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict
	@echo "the site is in site/: open site/index.html, or run $(VENV)/bin/mkdocs serve"

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) -e '.[docs]'
	touch $@

mutants: $(VENV)/.mutants
	$(PYTHON) benchmarks/mutants.py --out mutants.jsonl

$(VENV)/.mutants: $(VENV)/.installed
	$(PIP) -e '.[mutants]'
	touch $@

clean:
	rm -rf $(VENV) demo site
