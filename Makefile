# make demo | demo-lm | test | lint | bench | sanitize | cuda-report | sanitize-cuda | mutate-cuda: each sets up
# what it needs in .venv first.
# Uses the torch of the active Python where it is new enough, else installs TORCH into .venv.
# Builds for CUDA too where there is an nvcc, which it never downloads; LOSSOPS_CUDA=0 leaves CUDA out.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f)
EMULATOR := $(shell find tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')
BUILT := $(VENV)/.built
export MAX_JOBS ?= 2

.PHONY: demo demo-lm test lint format bench sanitize cuda-report check-cuda-report sanitize-cuda mutate-cuda build clean

demo: build
	@echo "== Training on scikit-learn's digits and diabetes with lossops and with torch.nn"
	$(BIN)/python examples/demo.py --out demo-output
	@echo "== Next: make demo-lm trains a language model without its logits: curves, time and memory (3 minutes)"

demo-lm: build
	@echo "== Training a language model on Python's own sources, without the logits and with them"
	$(BIN)/python examples/train_lm.py --out demo-output/lm

test: build
	@echo "== Running the tests"
	$(BIN)/python -m pytest -n $(MAX_JOBS)

lint: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy lossops
	$(BIN)/clang-format --dry-run -Werror $(filter %.h %.cpp %.inl %.cu %.cuh,$(SOURCES)) $(EMULATOR)

format: $(BUILT)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.h %.cpp %.inl %.cu %.cuh,$(SOURCES)) $(EMULATOR)

bench: build
	$(BIN)/python bench/run.py --device cpu

# The kernels under AddressSanitizer and UBSan, built apart. libasan has to be there before Python for
# torch's memory to be guarded, and libstdc++ with it, whose throw it wraps. Reports go past pytest's
# capture. Passive, for OpenMP threads that spin take minutes from each other where cores are few.
SANITIZED := build/sanitize
PRELOADED = $(shell for name in libasan libstdc++; do g++ -print-file-name=$$name.so; done)
sanitize: $(BUILT)
	@echo "== Building lossops with sanitizers and testing the kernels (about two minutes)"
	@LOSSOPS_SANITIZE=address,undefined $(BIN)/python setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)
	PYTHONPATH=$(SANITIZED) LD_PRELOAD="$(PRELOADED)" OMP_WAIT_POLICY=passive \
		ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1 \
		$(BIN)/pytest --capture=sys $(patsubst %,tests/test_%.py,contract cross_entropy mse numerics direct hostile) \
		-k "not (emulated or compile or export or opcheck or gradcheck or vmap or transforms or bitwise or fake)"

# The tables of docs/cuda.md: written, or compared. Machine code of nvcc is read by two small tools, which a
# toolkit may lack; where they cannot be installed the tables of machine code stay as they are.
cuda-report check-cuda-report: export PATH := $(PATH):/usr/local/cuda/bin
cuda-report check-cuda-report: build
	@(command -v cuobjdump && command -v nvdisasm) >/dev/null || \
		$(BIN)/pip install -q nvidia-cuda-cuobjdump==13.2.51 nvidia-cuda-nvdisasm==13.2.51 || true
	@echo "== Reading and emulating the CUDA kernels (about two minutes the first time)"
	$(BIN)/python tests/cuda_report.py $(if $(filter check-%,$@),--check)

# The CUDA kernels on the CPU, as nvcc compiled them: under AddressSanitizer and ThreadSanitizer, and with
# blocks and threads in every order. About two minutes for a dtype.
DTYPES ?= float16 bfloat16 float32 float64
sanitize-cuda: $(VENV)/.torch
	@echo "== Building the CUDA kernels for the emulator with sanitizers, and running their cases"
	cd tests && ../$(BIN)/python -m cuda_emulator.sanitize --dtypes $(DTYPES)

# How many one-token changes to the CUDA kernels go unnoticed. MUTATE="--sample 50 --seed 1" takes some.
MUTATE ?=
mutate-cuda: $(VENV)/.torch
	cd tests && ../$(BIN)/python -m cuda_emulator.mutate $(MUTATE)

build: $(BUILT)

$(VENV)/.torch:
	@command -v $(PYTHON) >/dev/null || { echo "lossops: needs $(PYTHON), and found none; install Python 3.10 or later, or name yours with PYTHON=..."; exit 1; }
	@echo "== Setting up $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "lossops: $(PYTHON) -m venv failed; on Debian, apt-get install python3-venv"; exit 1; }
	@if site=$$($(PYTHON) -c 'import os, torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10); print(os.path.dirname(os.path.dirname(torch.__file__)))' 2>/dev/null); then \
		echo "== Using the active torch in $$site"; \
		echo "$$site" > $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/active-torch.pth; \
	else \
		echo "== Installing $(TORCH)"; \
		$(BIN)/pip install -q $(TORCH); \
	fi
	@touch $@

$(BUILT): $(VENV)/.torch setup.py pyproject.toml lossops/version.txt $(SOURCES)
	@command -v $${CXX:-g++} >/dev/null || { echo "lossops: building needs a C++ compiler, and found no $${CXX:-g++}; on Debian, apt-get install g++"; exit 1; }
	@echo "== Installing the tools and building lossops (about a minute, more with CUDA)"
	@$(BIN)/pip install -q 'setuptools>=77' wheel ninja pybind11
	@$(BIN)/pip install -q --no-build-isolation -e '.[plots,demo,test,lint]'
	@$(BIN)/python -c 'import lossops; cuda = lossops.cuda_build_info(); \
		print("== Built with CUDA", cuda.toolkit, "for", *cuda.architectures) if cuda else \
		print("== Built for the CPU alone: found no nvcc, or LOSSOPS_CUDA=0")'
	@touch $@

clean:
	rm -rf build *.egg-info lossops/_C*.so $(BUILT)
