# slmake: thin targets over Snakemake, DVC and pytest. `make help` lists them.

SHELL   := /bin/bash
PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
# Which lock to install: cuda where there is an NVIDIA GPU, else cpu.
MACHINE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
TORCH   := torch==2.13.0
READY   := $(VENV)/.ready-$(MACHINE)
PEERS   := .venv-bench
# Tests at a time: one more than the cores of a small machine, because many wait for servers, networks and clusters.
WORKERS ?= 3
# Which tests stay together is said in tests/conftest.py; in the order of collection, those that wait for services begin.
PYTEST   = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder
# uv does not read pip's settings: a folder of wheels named for pip is meant for uv too.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# The torch build that fits the machine (uv's name for it), unless a folder of wheels says which.
TORCH_BACKEND ?= $(or $(UV_TORCH_BACKEND),$(if $(UV_FIND_LINKS),,$(if $(filter cuda,$(MACHINE)),auto,cpu)))
export DO_NOT_TRACK = 1
export TEXT URL

.DEFAULT_GOAL := build
.PHONY: build setup image sif test test-fast faults lint format docs lock ask report screenshots verify remote push pull restore azurite azureml reproduce bench peers clean help

build: setup ## set up if needed, build what params.yaml asks for, record it with DVC
	$(BIN)/snakemake --cores all
	@if [ -e build/report/overview.html ]; then $(BIN)/snakemake --quiet all --report build/report.html; fi
	@$(BIN)/python -m tools.record

setup: $(READY) ## create .venv from the locked environment

$(READY): envs/uv.lock envs/$(MACHINE).lock envs/dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "slmake needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Python's venv module is missing: install python3-venv."; exit 1; }
	@echo "setup: installing envs/$(MACHINE).lock into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r envs/uv.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --no-deps --require-hashes -r envs/$(MACHINE).lock -r envs/dev.lock
	@# Its CPU and CUDA builds have different hashes, so torch stands beside the lock, pinned by version.
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode $(if $(TORCH_BACKEND),--torch-backend=$(TORCH_BACKEND)) $(TORCH) \
	  || { echo "setup: torch backend '$(TORCH_BACKEND)' cannot be reached; taking the package index's own build (on Linux: CUDA, several GB)"; \
	       env -u UV_TORCH_BACKEND $(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode $(TORCH); }
	@touch $@

image: ## build the container image (docker or podman); MACHINE=cuda for NVIDIA GPUs
	@tools/image.sh $(MACHINE) $(TORCH) $(if $(UV_FIND_LINKS),,$(TORCH_BACKEND))

sif: setup ## turn that image into an Apptainer image, check it, print the line for params.yaml
	@tools/sif.sh $(MACHINE)
	@$(BIN)/python -m slmake.platforms.container containers/slmake-$(MACHINE).sif

ask: $(READY) ## ask the exported model: make ask TEXT="I never thought I'd see you again!"
	@$(BIN)/python -m tools.ask -- "$$TEXT"

report: setup ## put figures and tables on one page, build/report.html (missed gates included)
	$(BIN)/snakemake --cores all --quiet progress -- build/report/overview.html
	@$(BIN)/snakemake --quiet all --report build/report.html

screenshots: report ## photograph the report for the README (needs chromium and chromedriver)
	@$(BIN)/python tests/real/helpers/browser.py build/report.html docs

verify: $(READY) ## check build/package: sums, signature, provenance, inputs, and that it generates
	@$(BIN)/python -m tools.verify

test: setup azureml ## run the whole test suite
	$(PYTEST)

test-fast: setup ## the unit tests only
	$(PYTEST) tests/unit

faults: setup azurite ## break networks, servers and disks under push, pull, publish and fetch_model; figures to docs/reliability.md
	@rm -f build/faults.jsonl
	SLMAKE_FAULTS=build/faults.jsonl $(PYTEST) -q tests/real/test_faults.py; $(BIN)/python tests/real/helpers/faults_table.py build/faults.jsonl

lint: setup ## check code, Snakefile and generated files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile

format: setup ## format code and Snakefile
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile

docs: setup ## regenerate docs/params.md, docs/params.schema.json, dvc.yaml and azureml/pipeline.yml
	$(BIN)/python -m slmake.params.docs --output docs
	$(BIN)/python -m slmake.platforms.dvc_yaml --output dvc.yaml
	$(BIN)/python -m tools.azureml compile

remote: setup ## share through Azure Blob: make remote URL=azure://container/path
	@$(BIN)/python -m tools.remote add "$$URL"

push: setup ## upload data and everything that was built
	@$(BIN)/python -m tools.remote push

pull: setup ## download what was built elsewhere; then there is nothing to do
	@$(BIN)/python -m tools.remote pull

restore: setup ## put back what was built and recorded last, from DVC's cache on this disk
	@$(BIN)/python -m tools.remote restore

azurite: ## install the blob server that the tests start (needs npm)
	@npm ci --prefix tests/real/azurite --no-audit --no-fund --loglevel=error

azureml: setup ## install azure-ai-ml: azureml:// sources, runs on Azure Machine Learning
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --require-hashes -r envs/azureml.lock

reproduce: setup ## build twice, in two folders, and compare the bytes
	$(BIN)/python -m tools.reproduce

bench: peers build/base build/dataset ## measure us and the peers in turn, write docs/benchmarks.md: make bench ONLY=merge
	$(BIN)/python -m bench $(if $(ONLY),--only $(ONLY)) $(BENCH)

build/base build/dataset: | setup
	@test -e $@ || $(BIN)/snakemake --cores all --quiet progress -- $@

peers: $(PEERS)/.ready ## install what `make bench` measures against (Olive, TRL, llama.cpp) into .venv-bench

$(PEERS)/.ready: envs/bench.lock envs/llama.lock | setup
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@echo "peers: installing envs/bench.lock into $(PEERS)"
	@$(BIN)/uv pip install --quiet --python $(PEERS)/bin/python --no-deps --require-hashes -r envs/bench.lock
	@$(BIN)/uv pip install --quiet --python $(PEERS)/bin/python $(if $(TORCH_BACKEND),--torch-backend=$(TORCH_BACKEND)) $(TORCH)
	@echo "peers: compiling llama.cpp (ten minutes or more)"
	@CMAKE_ARGS="$(if $(filter cuda,$(MACHINE)),-DGGML_CUDA=on)" $(BIN)/uv pip install --quiet --python $(PEERS)/bin/python --no-deps --require-hashes -r envs/llama.lock \
	  || echo "peers: llama.cpp did not compile here (cmake and a C++ compiler are needed); it is left out of the comparison"
	@touch $@

lock: setup ## resolve envs/*.in into envs/*.lock
	tools/lock.sh $(BIN)/uv

clean: ## remove everything that was built (not the environment, not DVC's cache)
	rm -rf build results/* logs benchmarks .snakemake

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
