# Two commands: `make lra` trains a model and prints its row of the table; `make test` runs the tests.
# `make test-all` compiles everything for every chip too; `make test-newest` takes the newest versions.
# `make docs` builds the documentation into site/.
# Each has an environment of its own: the tests need compilers for machines that are not there.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
EXTRAS ?= dev
CONSTRAINTS ?= constraints.txt

# The tests import a small part of what is installed: bytecode is written at the first import.
export PYTHONDONTWRITEBYTECODE :=

LRA_RUN := runs/lra/listops-s5-cpu-seed0

# Every shape and type in a signature is checked at each call; it takes a fifth of the time.
TYPED := --jaxtyping-packages=seqmodels,beartype.beartype

.PHONY: lra test test-all test-newest check notebooks docs bench gpu clean

lra: .venv/installed
	.venv/bin/python -m experiments.lra.train --task listops --model s5 --preset cpu \
		--run-dir $(LRA_RUN) $$(test -d $(LRA_RUN)/checkpoints && echo --resume)
	.venv/bin/python -m experiments.lra.report

# One of each kind, with XLA's quick code generator where no portable operator's numbers are tested.
test: .venv-test/installed-$(EXTRAS)
	.venv-test/bin/python -m pytest -n 2 --dist worksteal

# All tests, compiled with full optimisation: several hours on two cores. Then every named shape on every
# chip: what has changed since the committed table is compiled again, and all of it must pass.
test-all: .venv-test/installed-$(EXTRAS)
	.venv-test/bin/python -m pytest -n 2 --dist worksteal --everything $(TYPED)
	.venv-test/bin/python -m experiments.kernels.aot
	.venv-test/bin/python -m experiments.kernels.aot --check

# A few tests of each floor with the newest versions: what a new jax breaks first. Bits, mapping, shapes
# and refusals are the same code in every version.
NEWEST := tests/pallas_kernels/tools/test_aot.py tests/pallas_kernels/common \
	tests/pallas_kernels/test_op_contract.py tests/seqmodels/models/test_language.py \
	tests/seqmodels/models/test_published.py

test-newest: .venv-newest/installed
	.venv-newest/bin/python -m pytest -n 2 --dist worksteal $(TYPED) $(NEWEST) \
		-k "not (bitwise or vmap or one_token or double_precision or refused or died \
		or parameter_counts or size_decides or the_shapes_of_a_call)"

check: .venv-test/installed-$(EXTRAS)
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy

# Each notebook once, on the CPU; with their outputs they go to docs/notebooks/, for the pages.
notebooks: .venv-test/installed-$(EXTRAS)
	.venv-test/bin/python -m experiments.notebooks

# The site, with the executed notebooks. Reads the code without importing it; a warning is an error. The
# variable silences the theme's advert for its successor, which is no warning.
docs: notebooks
	NO_MKDOCS_2_WARNING=1 .venv-test/bin/python -m mkdocs build --strict

bench: .venv-test/installed-$(EXTRAS)
	.venv-test/bin/python -m experiments.kernels.bench

# On a machine with a GPU, by the Python that has JAX for it: make gpu PYTHON=python3
gpu:
	$(PYTHON) -m experiments.gpu

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --constraint constraints.txt --editable .
	touch $@

.venv-test/installed-$(EXTRAS): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/python -m pip install --no-compile --constraint $(CONSTRAINTS) --editable ".[$(EXTRAS)]"
	touch $@

# Without PyTorch, which comes with CUDA's libraries for most versions of Python.
.venv-newest/installed: pyproject.toml constraints-newest.txt
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --no-compile --constraint constraints-newest.txt \
		--editable ".[test,aot]"
	touch $@

clean:
	rm -rf .venv .venv-test .venv-newest site
