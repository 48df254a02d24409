# Two commands for everybody: `make demo` and `make test`. Every target makes .venv and installs what it needs;
# stamp files in .venv keep repeat runs fast. Overridable: PYTHON, VENV, TORCH, TORCH_INDEX, ARGS. The gpu- targets
# take Python as it is where its torch sees a GPU already.

VENV ?= .venv
# The first Python that is new enough, unless one is named.
PYTHON ?= $(or $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done),python3)
# torch comes first, in a call of its own: a CPU build chosen here keeps gigabytes of CUDA packages away from machines
# without a GPU. With a driver present it is the default build; any other requirement can be named.
TORCH ?= torch==2.13.0
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi 2>/dev/null),,--extra-index-url https://download.pytorch.org/whl/cpu)
# More arguments for the command behind a target: make test ARGS="-x tests/kernels".
ARGS ?=

# Keeps the repository root off sys.path: `import kernels` there would hide the Hugging Face package of that name.
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --no-input
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test test-integrations chaos lint format compile-check bench bench-rollout bench-grpo \
	reproduce reproduce-all bundled-model clean gpu-build gpu-check gpu-bench gpu-sanitize
.DEFAULT_GOAL := help

help:
	@echo "make demo           decode with the bundled model under several budgets"
	@echo "make test           all tests (ARGS=... goes to pytest)"
	@echo "make test-integrations  the adapters against TRL and lm-eval, in an environment of its own"
	@echo "make chaos          kill -9 in every stage of a training run, and go on (minutes)"
	@echo "make lint           ruff, clang-format, mypy; changes nothing"
	@echo "make format         ruff format and fixes, clang-format"
	@echo "make compile-check  GPU kernels, compiled without a GPU"
	@echo "make bench          decode tokens/s beside Hugging Face generate"
	@echo "make bench-rollout  rollouts under budgets beside two calls of Hugging Face generate"
	@echo "make bench-grpo     steps of GRPO beside TRL's trainer, in an environment of its own"
	@echo "make gpu-check      build for the GPU and run all its tests, none skipped"
	@echo "make gpu-bench      measure on the GPU (WHAT=ops|decode|peers; default: all)"
	@echo "make gpu-sanitize   the CUDA kernels under compute-sanitizer"
	@echo "make reproduce      the paper's finding at toy scale: train under a budget, measure over budgets"
	@echo "make reproduce-all  the same with rivals, ablations and more seeds (hours)"
	@echo "make bundled-model  train the bundled tiny model anew"
	@echo "make clean          remove .venv and everything built"

demo: $(VENV)/.built
	$(BIN)/elastic-decode demo $(ARGS)

# The interpreter replaces Triton's compiler where @triton.jit decorates, so those tests need a process of their own.
test: $(VENV)/.built $(VENV)/.test
	@status=0; \
	$(BIN)/pytest -m "not interpret" $(ARGS) || status=$$?; \
	TRITON_INTERPRET=1 $(BIN)/pytest -m interpret $(ARGS) || status=$$?; \
	exit $$status

# The libraries themselves, in versions of their own: not in the environment of the tests.
INTEGRATIONS_VENV ?= .venv-integrations
test-integrations:
	$(MAKE) VENV=$(INTEGRATIONS_VENV) $(INTEGRATIONS_VENV)/.integrations
	ELASTIC_DECODE_INTEGRATIONS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 \
		$(INTEGRATIONS_VENV)/bin/pytest tests/integrations $(ARGS)

chaos: $(VENV)/.built $(VENV)/.test
	$(BIN)/python tests/chaos/run.py $(ARGS)

lint: $(VENV)/.built $(VENV)/.test $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

compile-check: $(VENV)/.built $(VENV)/.test
	$(BIN)/python benchmarks/compile_cuda.py
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/compile_triton.py

bench: $(VENV)/.built $(VENV)/.test
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/bench_decode.py $(ARGS)

bench-rollout: $(VENV)/.built
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/bench_rollout.py $(ARGS)

# All arms run in one environment, and TRL asks for versions of its own: not in that of the tests.
TRL_VENV ?= .venv-trl
bench-grpo:
	$(MAKE) VENV=$(TRL_VENV) $(TRL_VENV)/.built $(TRL_VENV)/.trl
	PYTHONPATH=benchmarks $(TRL_VENV)/bin/python benchmarks/bench_grpo.py $(ARGS)

bundled-model: $(VENV)/.built
	$(BIN)/python recipes/bundled_model/train.py --out elastic_decode/assets/tiny $(ARGS)

# ---- with a GPU ----

# A machine set up for CUDA, perhaps without a network, is used as it is: where $(PYTHON) has what is needed and its
# torch sees a GPU, or where VENV=system says so, nothing is installed and the extension is built in place. Elsewhere
# it is $(VENV), as for the other targets.
NEEDED_ON_GPU := import torch, triton, transformers, tokenizers, safetensors, pybind11, setuptools, pytest, hypothesis
SYSTEM = $(if $(filter system,$(VENV)),yes,$(shell $(PYTHON) -c \
	'$(NEEDED_ON_GPU); print("yes" if torch.cuda.is_available() else "")' 2>/dev/null))
# Only the package on the path, not the repository's root (see PYTHONSAFEPATH above).
GPU_PYTHON = $(if $(SYSTEM),PYTHONPATH=$(CURDIR)/build/path:$(CURDIR)/benchmarks $(PYTHON),\
	PYTHONPATH=$(CURDIR)/benchmarks $(BIN)/python)
WHAT ?= ops decode peers

# CUDA sources for the GPU that is there: a third of the time for all that are supported. --force links anew (what is
# compiled already is kept): an extension built without CUDA is as new as its sources, too.
FOR_THIS_GPU = ELASTIC_DECODE_CUDA=1 ELASTIC_DECODE_CUDA_ARCHS="$${ELASTIC_DECODE_CUDA_ARCHS:-$$($(1) -c \
	'import torch; print(*torch.cuda.get_device_capability(), sep="")' 2>/dev/null || echo 80 90 100)}" \
	$(1) setup.py -q build_ext --inplace --force
BUILD_IN_PLACE = mkdir -p build/path && ln -sfn ../../elastic_decode build/path/elastic_decode && \
	$(call FOR_THIS_GPU,$(PYTHON))
BUILD_IN_VENV = $(MAKE) $(VENV)/.built $(VENV)/.test && $(call FOR_THIS_GPU,$(BIN)/python)

gpu-build:
	$(if $(SYSTEM),$(BUILD_IN_PLACE),$(BUILD_IN_VENV))

gpu-check: gpu-build
	ELASTIC_DECODE_REQUIRE=triton,cuda $(GPU_PYTHON) tests/gpu/run.py $(ARGS)

gpu-bench: gpu-build
	$(GPU_PYTHON) benchmarks/bench_gpu.py $(WHAT) $(ARGS)

# Each tool instruments our kernels only. It slows them tenfold and more, so what has run when the time is up is told,
# in an order without meaning, and counts.
SANITIZE = $(GPU_PYTHON) tests/gpu/run.py --backend cuda --part --minutes 3.5 $(ARGS) \
	--finds '^========= +(Invalid|Misaligned|Error: |Race reported)' --under "compute-sanitizer \
	$$(compute-sanitizer --help | grep -q -- --kernel-name && echo --kernel-name kns=elastic_decode) \
	--error-exitcode 99 --print-limit 5 --report-api-errors no
gpu-sanitize: gpu-build
	@command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is missing: it comes with CUDA" >&2; exit 1; }
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZE) --tool memcheck" --name memcheck
	$(SANITIZE) --tool racecheck" --name racecheck

reproduce: $(VENV)/.built $(VENV)/.reproduce
	PYTHONPATH=recipes/reproduce $(BIN)/python recipes/reproduce/run.py $(ARGS)

reproduce-all: $(VENV)/.built $(VENV)/.reproduce
	PYTHONPATH=recipes/reproduce $(BIN)/python recipes/reproduce/run.py --all $(ARGS)

clean:
	rm -rf $(VENV) $(TRL_VENV) $(INTEGRATIONS_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find kernels csrc \( -name '*.so' -o -name '*.o' \) -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- what the targets stand on ----

define CHECK_MACHINE
import os, shutil, sys, sysconfig
need = "make needs Python >= 3.11 with venv and headers, and a C++17 compiler: "
if sys.version_info < (3, 11):
    sys.exit(f"{need}{sys.executable} is {sys.version.split()[0]}; name another: make PYTHON=python3.12")
try:
    import ensurepip, venv
except ImportError as error:
    sys.exit(f"{need}{error}; on Debian: apt install python3-venv")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    sys.exit(f"{need}Python.h is missing; on Debian: apt install python3-dev")
compiler = os.environ.get("CXX", "g++").split()[0]
if not shutil.which(compiler):
    sys.exit(f"{need}{compiler} is missing; on Debian: apt install g++, or name one with CXX=")
endef
export CHECK_MACHINE

$(VENV)/.torch:
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) found; install Python >= 3.11" >&2; exit 1; }
	@$(PYTHON) -c "$$CHECK_MACHINE"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "setuptools>=77" "pybind11>=2.13"
	$(PIP) install --no-deps $(TORCH_INDEX) "$(TORCH)"
	@touch $@

# The package, editable, with its extension (the tools to build it are in the environment, so no isolation). Where only
# C++ changed, what is stale is built in place.
$(VENV)/.built: pyproject.toml setup.py $(CXX_FILES) | $(VENV)/.torch
	$(if $(filter pyproject.toml setup.py,$?),$(PIP) install --no-build-isolation --editable .,\
		$(BIN)/python setup.py -q build_ext --inplace)
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.built
	$(PIP) install "elastic-decode[test]"
	@touch $@

$(VENV)/.trl: | $(VENV)/.built
	$(PIP) install "trl==1.16.0" "transformers==5.23.0" "pyyaml>=6"
	@touch $@

$(VENV)/.integrations: pyproject.toml | $(VENV)/.built
	$(PIP) install "elastic-decode[test,trl,lm-eval]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.built
	$(PIP) install "elastic-decode[dev]"
	@touch $@

$(VENV)/.reproduce: pyproject.toml | $(VENV)/.built
	$(PIP) install "elastic-decode[train,plot]"
	@touch $@
