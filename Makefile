# PIP_ARGS goes to every pip install (an index, say), ARGS to the demo or to pytest.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PIP_ARGS ?=
ARGS ?=

OLDEST := $(VENV)-oldest
NEWEST := $(VENV)-newest
VLLM := $(VENV)-vllm
LLAMA_CPP_PYTHON := 0.3.36
LLAMA_CPP := $(VENV)/llama_cpp_python-$(LLAMA_CPP_PYTHON)
CHECKPOINT ?= runs/checkpoint
RUFF := $(VENV)/bin/ruff
ON_GPU := --device cuda --dtype bfloat16

.DEFAULT_GOAL := help
.PHONY: help venv llama-cpp vllm demo checkpoint test coverage test-fast test-oldest test-newest newest constraints \
	bench bench-gpu gpu-check quality fix docs notebooks build clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.dev  ## make $(VENV) with everything that development needs

llama-cpp: $(LLAMA_CPP)/.built  ## build llama.cpp for its tests; some minutes

vllm: $(VLLM)/.built  ## install vLLM for its tests, in an environment of its own; some minutes

demo: $(VENV)/.demo  ## train, compare and generate on a small scale (ARGS="...")
	$(VENV)/bin/python scripts/demo.py $(ARGS)

# Each command goes on where an earlier run of it was interrupted.
checkpoint: $(VENV)/.dev  ## train a small model to share, with card, report, Qwen3-MoE twin and chat; about an hour
	$(VENV)/bin/mot train small_clm --output_dir $(CHECKPOINT)/mot --resume_from_checkpoint true $(ARGS)
	$(VENV)/bin/mot evaluate $(CHECKPOINT)/mot
	$(VENV)/bin/mot report $(CHECKPOINT)/mot
	$(VENV)/bin/mot transition transition --model_name_or_path $(CHECKPOINT)/mot --output_dir $(CHECKPOINT)/moe
	$(VENV)/bin/mot export $(CHECKPOINT)/moe $(CHECKPOINT)/qwen3_moe
	$(VENV)/bin/mot sft sft --model_name_or_path $(CHECKPOINT)/mot --output_dir $(CHECKPOINT)/chat
	@echo "Share it: $(VENV)/bin/mot push $(CHECKPOINT)/mot NAME"

# A worker keeps to its half of the tests, so that what a file shares is made once, until it takes from the other's.
XDIST = -n $(WORKERS) --dist worksteal

# One thread a worker: torch would start as many as there are cores, in each of them.
test coverage test-fast test-oldest test-newest: export OMP_NUM_THREADS := 1
# Without them, or before `make llama-cpp` and `make vllm`, the tests with llama.cpp and vLLM are skipped.
test coverage: export LLAMA_CPP_SOURCE ?= $(abspath $(LLAMA_CPP)/vendor/llama.cpp)
test coverage: export VLLM_PYTHON ?= $(abspath $(VLLM)/bin/python)

test: $(VENV)/.dev  ## run all tests, or some (ARGS="-k layer")
	$(VENV)/bin/python -m pytest $(XDIST) $(ARGS)

# Apart from `make test`, which it makes half as long again.
coverage: $(VENV)/.dev  ## run all tests and measure their coverage, which has a floor
	$(VENV)/bin/python -m pytest $(XDIST) --cov

test-fast: $(VENV)/.dev  ## run the tests that are not marked slow
	$(VENV)/bin/python -m pytest $(XDIST) -m "not slow" $(ARGS)

test-oldest: $(OLDEST)/.dev  ## run the tests with the oldest supported transformers
	$(OLDEST)/bin/python -m pytest $(XDIST) $(ARGS)

# Also past the ceiling of setup.py: this is how to learn what the next version breaks. A bare torch is several
# gigabytes, so torch stays at its pin. Nothing is installed where the pins are the newest versions.
test-newest: $(VENV)/.dev  ## run the fast tests of models and ecosystem with the newest versions of all but torch
	mkdir -p build
	grep '^torch==' constraints.txt > build/torch.txt
	$(VENV)/bin/python -m pip install $(PIP_ARGS) --dry-run --upgrade --upgrade-strategy eager -c build/torch.txt \
		-e ".[dev]" > build/newest.txt
	$(VENV)/bin/python -m pip install $(PIP_ARGS) --dry-run --no-deps --upgrade -c build/torch.txt transformers \
		>> build/newest.txt
	@if grep "^Would install" build/newest.txt | grep -qvE "^Would install mot_hf-[^ ]*$$"; then \
		grep "^Would install" build/newest.txt; \
		$(MAKE) newest && $(NEWEST)/bin/python -m pip install $(PIP_ARGS) -c $(NEWEST)/torch.txt -e ".[dev]" && \
		$(NEWEST)/bin/python -m pip install $(PIP_ARGS) -c $(NEWEST)/torch.txt --upgrade transformers && \
		$(NEWEST)/bin/python -m pytest $(XDIST) -m "not slow" tests/modeling tests/ecosystem $(ARGS); \
	else \
		echo "Nothing was released since constraints.txt, and \`make test\` tests that."; \
	fi

newest:
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	grep '^torch==' constraints.txt > $(NEWEST)/torch.txt

# To pin another torch, change its line in constraints.txt first. Its CPU build has the same version as the others.
constraints: newest  ## pin the newest versions that setup.py admits, for Python 3.11 to 3.13
	$(NEWEST)/bin/python -m pip install $(PIP_ARGS) uv
	grep '^#' constraints.txt > $(NEWEST)/header.txt
	$(NEWEST)/bin/uv pip compile setup.py --extra dev --universal --python-version 3.11 $(PIP_ARGS) \
		--constraints $(NEWEST)/torch.txt --no-emit-package pip --no-annotate --no-header --quiet -o $(NEWEST)/pins.txt
	sed 's/+cpu//' $(NEWEST)/pins.txt | cat $(NEWEST)/header.txt - > constraints.txt

bench: $(VENV)/.dev  ## measure speed and memory on this CPU; an hour, close other programs
	$(VENV)/bin/python -m scripts.benchmarks.layer.run --hidden_sizes 256 512 --num_rounds 5 \
		--output_dir scripts/benchmarks/layer/results/cpu
	$(VENV)/bin/python -m scripts.benchmarks.train_step.run --hidden_sizes 256 --num_rounds 5 \
		--output_dir scripts/benchmarks/train_step/results/cpu
	$(VENV)/bin/python -m scripts.benchmarks.optimizer.run --output_dir scripts/benchmarks/optimizer/results/cpu

bench-gpu: $(VENV)/.dev  ## the same on a GPU, and the comparisons of headline and precision
	$(VENV)/bin/python -m scripts.benchmarks.layer.run $(ON_GPU) --num_tokens 16384 65536 \
		--output_dir scripts/benchmarks/layer/results/gpu_eager
	$(VENV)/bin/python -m scripts.benchmarks.layer.run $(ON_GPU) --num_tokens 16384 65536 --torch_compile true \
		--output_dir scripts/benchmarks/layer/results/gpu_compiled
	$(VENV)/bin/python -m scripts.benchmarks.train_step.run $(ON_GPU) --num_rows 256 --hidden_sizes 512 1024 \
		--output_dir scripts/benchmarks/train_step/results/gpu_eager_bfloat16
	$(VENV)/bin/python -m scripts.benchmarks.train_step.run $(ON_GPU) --num_rows 256 --hidden_sizes 512 1024 \
		--torch_compile true --output_dir scripts/benchmarks/train_step/results/gpu_compiled_bfloat16
	$(VENV)/bin/python -m scripts.benchmarks.optimizer.run --device cuda --bf16 true --hidden_size 1024 \
		--intermediate_size 2816 --num_rows 128 --step_rows 128 512 2048 --output_dir scripts/benchmarks/optimizer/results/gpu
	$(VENV)/bin/python -m scripts.benchmarks.headline.run scripts/benchmarks/headline/recipes/gpu.yaml
	$(VENV)/bin/python -m scripts.benchmarks.precision.run scripts/benchmarks/precision/recipes/gpu.yaml

# With the Python that is there, and no network: WHEELS names a folder with what that Python lacks.
gpu-check:  ## check and measure on one GPU in eight minutes (WHEELS=folder ARGS="...")
	$(PYTHON) -m scripts.benchmarks.gpu.run $(if $(WHEELS),--wheels $(WHEELS)) $(ARGS)

quality: export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
quality: $(VENV)/.dev .typings/mot_hf/modeling  ## lint, check the format, the spelling and the types
	$(RUFF) check .
	$(RUFF) format --check .
	$(VENV)/bin/codespell
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

fix: $(VENV)/.dev  ## repair what ruff can repair
	$(RUFF) check --fix --exit-zero .
	$(RUFF) format .

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.dev  ## build the documentation in site/; links and anchors that lead nowhere are errors
	$(VENV)/bin/python -m mkdocs build --strict $(ARGS)

notebooks: $(VENV)/.dev  ## run the notebooks and the report of the documentation again and store them; some minutes
	$(VENV)/bin/python -m scripts.docs.run_notebooks
	$(VENV)/bin/python -m scripts.docs.make_report

build: $(VENV)/.dev  ## make the sdist and the wheel in dist/, and check what an index would show of them
	rm -rf build dist
	$(VENV)/bin/python -m build --no-isolation
	$(VENV)/bin/python -m twine check --strict dist/*

clean:  ## remove everything that make made
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(VLLM) .typings build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_ARGS) -c constraints.txt torch
	touch $@

$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: $(VENV)/.torch setup.py
	$(VENV)/bin/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[$*]"
	touch $@

# It takes from $(VENV) what is the same in both, which installs in a sixth of the time.
$(OLDEST)/.dev: $(VENV)/.dev constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $(OLDEST)/shared.pth
	mv $(OLDEST)/shared.pth $(OLDEST)/lib/python3*/site-packages/
	grep -vE '^(huggingface-hub|transformers)==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install $(PIP_ARGS) -c constraints-oldest.txt -c $(OLDEST)/constraints.txt -e ".[dev]"
	touch $@

# The bindings' source distribution holds llama.cpp, with the converter that no wheel has. They do not use llama.cpp's
# common library, which is two fifths of what there is to compile.
$(LLAMA_CPP)/.built: $(VENV)/.dev
	$(VENV)/bin/python -m pip download $(PIP_ARGS) --no-deps --no-binary llama-cpp-python -d $(VENV) \
		llama-cpp-python==$(LLAMA_CPP_PYTHON)
	tar -xzf $(LLAMA_CPP).tar.gz -C $(VENV)
	sed -i.orig 's/LLAMA_BUILD_COMMON ON CACHE/LLAMA_BUILD_COMMON OFF CACHE/' $(LLAMA_CPP)/CMakeLists.txt
	$(VENV)/bin/python -m pip install $(PIP_ARGS) -c constraints.txt $(LLAMA_CPP)/
	touch $@

# All packages are pinned: vLLM's own requirements would add others for audio and images, and other versions of torch.
$(VLLM)/.built: constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install $(PIP_ARGS) --no-deps -r constraints-vllm.txt
	touch $@

.typings/mot_hf/modeling:
	mkdir -p $(@D)
	ln -s ../../modeling $@
