# Run everything from a bare clone. `make demo` and `make test` create .venv and install the tested versions first.
#   PYTHON=python3.12   interpreter of .venv (3.10 to 3.13)
#   DEMO_OUT=demo-out   output folder of the demo
#   ARGS="-k otsu"      more arguments for pytest or the demo
#   PART=all            part of the GPU benchmark (1 to 4)
#   WORKERS=2           processes of the tests
#   THREADS=1           threads of each process of the tests
#   TORCH="2.9.0 2.15.0"   versions of torch that `make wheels` tests the wheels with; CUDA builds of gigabytes
#   KILLS=300 INPUTS=100000 MINUTES=18   size of the soak; ARGS="--parts kills" runs a part of it

PYTHON ?= python3
DEMO_OUT ?= demo-out
ARGS ?=
PART ?= all
WORKERS ?= 2
THREADS ?= 1
KILLS ?= 300
INPUTS ?= 100000
MINUTES ?= 18
TORCH ?=
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help install demo test sanitize soak gpu gpu-wheels lint types docs wheels clean
.DEFAULT_GOAL := help

help:
	@echo "make demo | test | sanitize | soak | gpu | gpu-wheels | lint | types | docs | wheels | clean | install"

# The install is editable: only changes of compiled sources and of requirements install again. CUDA is compiled for the
# cards of this machine only, which saves minutes; setup.py lists the variables of the build.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v else f"ospo-fast needs Python 3.10 or newer; $(PYTHON) is %d.%d: make PYTHON=python3.12" % v)'
	@echo 'Installing into .venv: PyTorch and the packages of constraints.txt, then the compiled kernels. This takes about'
	@echo '5 minutes on two cores, and 3 GB of disk (7 GB where PyTorch brings CUDA). pip says below what it does.'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	OSPO_FAST_CUDA_ARCHS=$${OSPO_FAST_CUDA_ARCHS-native} $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[pipeline,dev]'
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/ospo-fast demo --out $(DEMO_OUT) $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(ARGS)

# Needs GCC. The sanitized package is a copy in build/sanitize.
sanitize: $(STAMP)
	$(BIN)/python tests/ops/sanitize.py $(ARGS)

# See docs/reliability.md. ARGS="--write" writes the table there.
soak: $(STAMP)
	PYTHONPATH=bench $(BIN)/python -m soak --kills $(KILLS) --inputs $(INPUTS) --minutes $(MINUTES) --out soak-out $(ARGS)

# Wheels in .whl (from `make gpu-wheels`) are installed for the run alone. Missing peers are skipped.
gpu: $(STAMP)
	PYTHON=$(abspath $(BIN))/python bench/gpu.sh $(PART)

gpu-wheels:
	rm -rf build/wheels
	$(PYTHON) -m pip wheel --disable-pip-version-check --quiet --no-deps --constraint constraints.txt --wheel-dir build/wheels liger-kernel cut-cross-entropy omegaconf
	rm -rf .whl && mv build/wheels .whl

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# The packages of the extra `docs`, which the tests need not have.
docs: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt mkdocs-material 'mkdocstrings[python]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# For each Python 3.10 to 3.13 that is found, into dist/. CUDA for all architectures, if nvcc is found.
wheels: $(STAMP)
	$(BIN)/python .ci/wheels.py --torch $(TORCH) $(ARGS)

clean:
	rm -rf build dist soak-out *.egg-info ospo_fast/_C.*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis $(STAMP)
