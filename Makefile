# Two commands: `make demo` trains a model with four nodes on this machine, `make test` runs every test.
# Both do all of the set-up themselves, in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# The torch release that the tests run on; constraints.txt pins the same one.
TORCH  ?= torch==2.13.0

.PHONY: demo test nightly setup lint program proto docs bench clean

demo: setup
	$(BIN)/psyche-sim $(ARGS)

test: setup lint
	$(BIN)/pytest $(ARGS)

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(wildcard optimizer/native/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "psyche-node needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

program: setup
	$(BIN)/python -m coordinator.toolchain.build
	$(BIN)/python -m coordinator.idl

proto: setup
	$(BIN)/python proto/generate.py

bench: setup
	$(BIN)/python -m benchmarks.program_cu
	$(BIN)/python -m benchmarks.optimizer
	$(BIN)/python -m benchmarks.convergence

# What takes too long for every change: a million inputs for the decoder of updates.
nightly: setup
	$(BIN)/python tests/optimizer/codec_fuzzing.py 1000000
	REPLICA_ROUNDS=500 $(BIN)/pytest -q tests/optimizer/test_sharding.py -k for_long --timeout 1800

docs: setup
	$(BIN)/python docs/generate.py
	$(BIN)/python -m coordinator.idl

clean:
	rm -rf $(VENV) build runs
