# Every target makes what it needs in .venv, from nothing; a second call finds it there.
PYTHON ?= python3
BIN := .venv/bin

# The versions everything here is installed at, build tools included.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt

EXTRAS_demo := demo,k-diffusion
EXTRAS_test := eval,k-diffusion,diffusers,lookup,timm,transformers,docs,test
EXTRAS_docs := docs

# Processes that share the tests; each takes some 3 GB.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs wheel try bench clean
.NOTPARALLEL:

help:
	@echo 'make demo    eight prompts, with and without sparke: pictures in demo/'
	@echo 'make test    the tests, and how much of sparke/ they run'
	@echo 'make lint    ruff and mypy'
	@echo 'make docs    the documentation, in site/'
	@echo 'make wheel   the source distribution and the wheel made from it, in dist/'
	@echo 'make try     both of them installed in empty environments, the demo run from each'
	@echo 'make bench   the benchmarks'
	@echo 'make clean   remove what the other targets made'

demo: .venv/.with-demo
	$(BIN)/sparke demo --out demo

test: .venv/.with-test
	$(BIN)/python -m pytest -n $(WORKERS) --cov --cov-report=term:skip-covered

lint: .venv/.with-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: .venv/.with-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo 'Documentation in site/index.html'

wheel: | $(BIN)/python
	rm -rf dist
	@$(BIN)/pip install --quiet build
	$(BIN)/python -m build --quiet --outdir dist .

# With the Python that PYTHON names, and nothing pinned: what pip gives a user of that Python.
try: wheel
	@unset PIP_CONSTRAINT PIP_BUILD_CONSTRAINT; set -e; \
	for made in dist/*.whl dist/*.tar.gz; do \
	    rm -rf .try && $(PYTHON) -m venv .try; \
	    echo "Installing $$made[demo,k-diffusion] with $$($(PYTHON) --version)"; \
	    .try/bin/pip install --quiet "$$made[demo,k-diffusion]"; \
	    (cd .try && bin/sparke demo -n 4 --out demo); \
	done; \
	rm -rf .try

bench: .venv/.with-test
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv .try dist site demo .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@echo 'Making a virtual environment in .venv'
	@$(PYTHON) -m venv .venv

.venv/.with-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing sparke[$(EXTRAS_$*)] in .venv (with torch: some minutes and 6 GB the first time)'
	@$(BIN)/pip install --quiet --editable '.[$(EXTRAS_$*)]'
	@touch $@
