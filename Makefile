# Two commands: `make lra` trains a model and prints its row of the table; `make test` runs the tests.
# Each has an environment of its own: the tests need compilers for machines that are not there.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
EXTRAS ?= dev

LRA_RUN := runs/lra/listops-s5-cpu-seed0

.PHONY: lra test check bench clean

lra: .venv/installed
	.venv/bin/python -m experiments.lra.train --task listops --model s5 --preset cpu \
		--run-dir $(LRA_RUN) $$(test -d $(LRA_RUN)/checkpoints && echo --resume)
	.venv/bin/python -m experiments.lra.report

# Most of the tests' time is XLA compiling small programs. Where a test is of kernels that are only
# interpreted, or of what modules do with operators, XLA may use its quick code generator; the
# portable operators, training and all else are tested as users run them. `pytest` alone does that
# with everything.
QUICKLY := $(wildcard tests/pallas_kernels/*/test_*_kernels.py tests/pallas_kernels/*/test_*_tpu.py \
	tests/pallas_kernels/*/test_*_gpu.py) tests/seqmodels/mixers tests/seqmodels/models
QUICK := --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false \
	--xla_cpu_parallel_codegen_split_count=1

test: .venv-test/installed-$(EXTRAS)
	.venv-test/bin/python -m pytest -n 2 --dist worksteal $(QUICKLY:%=--ignore=%)
	XLA_FLAGS="$(QUICK)" .venv-test/bin/python -m pytest -n 2 --dist worksteal $(QUICKLY)

check: .venv-test/installed-$(EXTRAS)
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy

bench: .venv-test/installed-$(EXTRAS)
	.venv-test/bin/python -m experiments.kernels.bench

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --constraint constraints.txt --editable .
	touch $@

.venv-test/installed-$(EXTRAS): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/python -m pip install --constraint constraints.txt --editable ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf .venv .venv-test
