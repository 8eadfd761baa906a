# quickstart  install and fine-tune the bundled demo model (a few minutes)
# test        run the tests; test-slow runs the long ones
# test-crash  kill runs with SIGKILL at random moments and damage checkpoints: the figures of docs/reliability.md
# check       lint and test
# lint        ruff, mypy and the import rules
# docs        write the generated pages of docs/ anew
# clean       remove the environment and every cache; runs and projects stay
#
# Works with any POSIX make. PYTHON chooses the interpreter, PIP_FLAGS goes to every pip install:
#     make quickstart PYTHON=python3.12

PYTHON = python3
PIP_FLAGS =
BIN = .venv/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install -q $(PIP_FLAGS)
PROJECT = quickstart

quickstart: .venv/installed
	$(BIN)/phinetune quickstart $(PROJECT)

test: .venv/installed-dev
	$(BIN)/python -m pytest -q -m "not slow"

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -q -m slow

test-crash: .venv/installed-dev
	$(BIN)/python -m pytest -q -s -m slow tests/crash

check: lint test

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

docs: .venv/installed-dev
	$(BIN)/python tools/write_docs.py

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "phinetune needs Python 3.11 or newer; '$(PYTHON)' is older or missing."; \
	    echo "Install one, then: make PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@touch $@

# torch comes first, alone: the rest then keeps the build that is there.
.venv/installed: .venv/created pyproject.toml constraints.txt
	@echo "Installing into .venv (PyTorch is large: the first time takes a few minutes)"
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -c constraints.txt -e .
	@touch $@

.venv/installed-dev: .venv/installed
	$(PIP) -c constraints.txt -e ".[dev]"
	@touch $@

.PHONY: quickstart test test-slow test-crash check lint docs clean
