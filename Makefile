# make demo    sets up and completes a hole in a real file        make test    sets up and runs the tests
# make setup   the set-up alone, into .venv                       make check   lint and types
# make bench   speed beside llama.cpp, in an environment of its own
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NATIVE := pyproject.toml CMakeLists.txt $(wildcard codegemma/native/src/*)
INSTALL = $(PIP) --no-build-isolation --editable
.PHONY: setup demo test check docs bench bench-env languages clean

setup: .venv/.setup

# The build tools stay in .venv, so that a later build compiles only what changed.
.venv/.tools: pyproject.toml
	@PYTHON=$(PYTHON) scripts/system_packages
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) cmake ninja $$($(PYTHON) scripts/build_requirements)
	@touch $@

.venv/.setup: .venv/.tools $(NATIVE)
	$(INSTALL) ".[default-model]"
	@touch $@

.venv/.dev: .venv/.setup
	$(INSTALL) ".[all,dev]"
	@touch $@

demo: .venv/.setup
	@$(BIN)/python scripts/demo.py

test: .venv/.dev
	@$(BIN)/python -m pytest

check: .venv/.dev
	@scripts/check

docs: .venv/.dev
	$(BIN)/python scripts/help.py > docs/cli.md

bench-env: .venv-bench/.setup

.venv-bench/.setup: benchmarks/requirements.txt
	@PYTHON=$(PYTHON) scripts/system_packages
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	CMAKE_ARGS="-DGGML_NATIVE=ON" .venv-bench/bin/python -m pip install --quiet -r benchmarks/requirements.txt
	@touch $@

bench: .venv/.setup .venv-bench/.setup
	$(BIN)/python benchmarks/engine.py --log
	$(BIN)/python benchmarks/keystrokes.py --log
	$(BIN)/python benchmarks/start.py --log

languages:
	scripts/install_languages

clean:
	rm -rf .venv .venv-bench build
