# Every target makes what it needs in .venv, from nothing; a second call finds it there.
PYTHON ?= python3
BIN := .venv/bin

# The versions everything here is installed at, build tools included.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt

EXTRAS_demo := demo,k-diffusion
EXTRAS_test := demo,k-diffusion,diffusers,lookup,test
EXTRAS_docs := docs

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs wheel bench clean
.NOTPARALLEL:

help:
	@echo 'make demo    one prompt, with and without sparke: pictures in demo/'
	@echo 'make test    the tests'
	@echo 'make lint    ruff and mypy'
	@echo 'make docs    the documentation, in site/'
	@echo 'make wheel   the wheel, in dist/'
	@echo 'make bench   the benchmarks'
	@echo 'make clean   remove what the other targets made'

demo: .venv/.with-demo
	$(BIN)/sparke demo --out demo

test: .venv/.with-test
	$(BIN)/python -m pytest

lint: .venv/.with-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: .venv/.with-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo 'Documentation in site/'

wheel: | $(BIN)/python
	rm -rf dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

bench: .venv/.with-test
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv dist site demo .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@echo 'Making a virtual environment in .venv'
	@$(PYTHON) -m venv .venv

.venv/.with-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing sparke[$(EXTRAS_$*)] in .venv (with torch: some minutes and 6 GB the first time)'
	@$(BIN)/pip install --quiet --editable '.[$(EXTRAS_$*)]'
	@touch $@
