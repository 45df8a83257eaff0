# slmake: thin targets over Snakemake, DVC and pytest. `make` builds, `make help` lists the rest.

SHELL   := /bin/bash
PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
# Which lock to install: cuda where there is an NVIDIA GPU, else cpu.
MACHINE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
TORCH   := torch==2.13.0
READY   := $(VENV)/.ready-$(MACHINE)
SERVE_READY := $(VENV)/.ready-serve
PEERS   := .venv-bench
# Tests at a time: two more than the cores of a small machine, because many wait for servers, networks and clusters.
WORKERS ?= 5
# Which tests stay together, and which begin, is said in tests/conftest.py.
PYTEST   = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder
# uv does not read pip's settings: a folder of wheels named for pip is meant for uv too.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# The torch build that fits the machine (uv's name for it), unless a folder of wheels says which.
TORCH_BACKEND ?= $(or $(UV_TORCH_BACKEND),$(if $(UV_FIND_LINKS),,$(if $(filter cuda,$(MACHINE)),auto,cpu)))
INSTALL  = $(BIN)/uv pip install --quiet --compile-bytecode --python
export DO_NOT_TRACK = 1
# As they were typed: make would take `$5` in a text for a variable of its own, and run `$(shell …)`.
override TEXT := $(value TEXT)
override URL := $(value URL)
export TEXT URL

.DEFAULT_GOAL := build
.PHONY: build report rehearse preview ask chat serve verify seeds reproduce restore clean help setup azureml lm-eval azurite peers image sif \
        remote push pull test test-fast tokenizers faults attack lint format docs models screenshots lock bench

##@ Build
build: setup ## set up if needed, build what params.yaml asks for; VERBOSE=1 shows all
	@$(BIN)/python -m tools.build $(if $(VERBOSE),--verbose)

report: setup ## put figures and tables on one page, build/report.html, missed gates included
	@$(BIN)/python -m tools.build build/report/overview.html

rehearse: setup ## try the chain on a small twin of the base model; estimate memory, time and disk
	@$(BIN)/python -m tools.build results/rehearsal.json

preview: setup ## show a row as the model sees it: make preview ROW=3; TOKENS=1 adds token ids
	@$(BIN)/python -m tools.build build/dataset
	@$(BIN)/python -m tools.preview $(if $(ROW),--row $(ROW)) $(if $(TOKENS),--tokens)

ask: $(READY) ## ask the exported model: make ask TEXT="I never thought I'd see you again!"
	@$(BIN)/python -m tools.ask -- "$$TEXT"

chat: $(READY) ## chat with the exported model in this terminal
	@$(BIN)/python -m tools.chat

serve: $(SERVE_READY) ## serve it as OpenAI's API, on this machine only: make serve PORT=8000
	@$(BIN)/python -m tools.serve --port $(or $(PORT),8000)

verify: $(READY) ## check build/package: checksums, signature, provenance, and that it generates
	@$(BIN)/python -m tools.verify

seeds: setup ## train with N=5 seeds, show mean and spread; SEEDS="--splits 42 7"
	@$(BIN)/python -m tools.seeds --runs $(or $(N),5) $(SEEDS)

reproduce: setup ## build again in another folder and compare the bytes
	@$(BIN)/python -m tools.reproduce

clean: ## remove all that was built (not .venv, DVC's cache or results/seeds.*)
	rm -rf build logs benchmarks .snakemake
	@test ! -d results || find results -mindepth 1 -maxdepth 1 ! -name 'seeds.*' -exec rm -rf {} +

help: ## list the targets
	@awk -F ':.*## ' '/^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

##@ Share
remote: setup ## share through Azure Blob: make remote URL=azure://container/path
	@$(BIN)/python -m tools.remote add "$$URL"

push: setup ## upload data and everything that was built
	@$(BIN)/python -m tools.remote push

pull: setup ## download what was built elsewhere; then there is nothing to do
	@$(BIN)/python -m tools.remote pull

restore: setup ## put back what was built and recorded last, from DVC's cache on this disk
	@$(BIN)/python -m tools.remote restore

##@ Set up
setup: $(READY) ## create .venv from the locked environment

$(READY): envs/uv.lock envs/$(MACHINE).lock envs/dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "slmake needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Python's venv module is missing: install python3-venv."; exit 1; }
	@echo "setup: installing envs/$(MACHINE).lock into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r envs/uv.lock
	@$(INSTALL) $(BIN)/python --no-deps --require-hashes -r envs/$(MACHINE).lock -r envs/dev.lock
	@# Its CPU and CUDA builds have different hashes, so torch stands beside the lock, pinned by version.
	@$(INSTALL) $(BIN)/python $(if $(TORCH_BACKEND),--torch-backend=$(TORCH_BACKEND)) $(TORCH) \
	  || { echo "setup: torch backend '$(TORCH_BACKEND)' cannot be reached; taking the package index's own build (on Linux: CUDA, several GB)"; \
	       env -u UV_TORCH_BACKEND $(INSTALL) $(BIN)/python $(TORCH); }
	@touch $@

$(SERVE_READY): $(READY) envs/serve.lock
	@$(INSTALL) $(BIN)/python --no-deps --require-hashes -r envs/serve.lock
	@touch $@

azureml: setup ## install azure-ai-ml: azureml:// sources, runs on Azure Machine Learning
	@$(INSTALL) $(BIN)/python --no-deps --require-hashes -r envs/azureml.lock

lm-eval: setup ## install EleutherAI's lm-evaluation-harness: evaluate.lm_eval
	@$(INSTALL) $(BIN)/python --no-deps --require-hashes -r envs/lm-eval.lock

image: ## build the container image (docker or podman); MACHINE=cuda for NVIDIA GPUs
	@tools/image.sh $(MACHINE) $(TORCH) $(if $(UV_FIND_LINKS),,$(TORCH_BACKEND))

sif: setup ## turn that image into an Apptainer image; print the line for params.yaml
	@tools/sif.sh $(MACHINE)
	@$(BIN)/python -m slmake.platforms.container containers/slmake-$(MACHINE).sif

##@ Develop
test: setup azureml lm-eval $(SERVE_READY) ## run the whole test suite
	$(PYTEST)

test-fast: setup ## run the unit tests only
	$(PYTEST) tests/unit

lint: setup ## check code and Snakefile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules/common.smk

format: setup ## format code and Snakefile
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile rules/common.smk

docs: setup ## regenerate docs/params.*, dvc.yaml and azureml/pipeline.yml
	$(BIN)/python -m slmake.params.docs --output docs
	$(BIN)/python -m slmake.platforms.dvc_yaml
	$(BIN)/python -m tools.azureml compile

models: setup ## try a twin of each model in tools/models.yaml, write docs/models.md
	$(BIN)/python -m tools.models --output docs/models.md --log logs/models.log

screenshots: report ## photograph the report for the README (needs chromium and chromedriver)
	@$(BIN)/python tests/real/helpers/browser.py build/report.html docs

lock: setup ## resolve envs/*.in into envs/*.lock
	@tools/lock.sh $(BIN)/uv

azurite: ## install the blob server that the tests start (needs npm)
	@npm ci --prefix tests/real/azurite --no-audit --no-fund --loglevel=error

tokenizers: ## install the real tokenizers that tests compare with (needs npm)
	@npm ci --prefix tests/real/tokenizers --no-audit --no-fund --loglevel=error

faults: setup azurite ## break networks, servers and disks; figures to docs/reliability.md
	@rm -f build/faults.jsonl
	SLMAKE_FAULTS=build/faults.jsonl $(PYTEST) -q tests/real/test_faults.py; code=$$?; \
	  $(BIN)/python tests/real/helpers/faults_table.py build/faults.jsonl && exit $$code

attack: setup ## kill and edit builds of a tiny project for SECONDS=600; docs/reliability.md
	$(BIN)/python tests/attack/campaign.py --document --seconds $(or $(SECONDS),600) $(if $(SEED),--seed $(SEED))

##@ Compare with the peers
bench: peers build/base build/dataset ## measure us and the peers, write docs/benchmarks.md: make bench ONLY=merge
	$(BIN)/python -m bench $(if $(ONLY),--only $(ONLY)) $(BENCH)

build/base build/dataset: | setup
	@test -e $@ || $(BIN)/python -m tools.build $@

peers: $(PEERS)/.ready ## install Olive, TRL and llama.cpp into .venv-bench

$(PEERS)/.ready: envs/bench.lock envs/llama.lock | setup
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@echo "peers: installing envs/bench.lock into $(PEERS)"
	@$(INSTALL) $(PEERS)/bin/python --no-deps --require-hashes -r envs/bench.lock
	@$(INSTALL) $(PEERS)/bin/python $(if $(TORCH_BACKEND),--torch-backend=$(TORCH_BACKEND)) $(TORCH)
	@echo "peers: compiling llama.cpp (ten minutes or more)"
	@CMAKE_ARGS="$(if $(filter cuda,$(MACHINE)),-DGGML_CUDA=on)" $(INSTALL) $(PEERS)/bin/python --no-deps --require-hashes -r envs/llama.lock \
	  || echo "peers: llama.cpp did not compile here (cmake and a C++ compiler are needed); it is left out of the comparison"
	@touch $@
