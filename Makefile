# Everything from a bare clone: `make demo` and `make test` create .venv, install with the tested versions, and run.
#   PYTHON=python3.12   the interpreter that .venv is made with (3.10 to 3.13)
#   DEMO_OUT=demo-out   where the demo writes
#   ARGS="-k otsu"      further arguments of pytest or of the demo
#   PART=all            which part of the GPU figures (1 to 4)

PYTHON ?= python3
DEMO_OUT ?= demo-out
ARGS ?=
PART ?= all
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help install demo test gpu gpu-wheels lint types wheel clean
.DEFAULT_GOAL := help

help:
	@echo "make demo | test | gpu | gpu-wheels | lint | types | wheel | clean | install"

# The editable install sees changes of Python files; changes of what is compiled or required bring it here again.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v else f"ospo-fast needs Python 3.10 or newer; $(PYTHON) is %d.%d: make PYTHON=python3.12" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[pipeline,dev]'
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/ospo-fast demo --out $(DEMO_OUT) $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

# The peers install into .whl for the run alone; without network the run does without those that are not there.
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

wheel: $(STAMP)
	$(BIN)/python -m build

clean:
	rm -rf build dist *.egg-info ospo_fast/_C.*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis $(STAMP)
