# Two commands: `make demo` trains a model with four nodes on this machine, `make test` runs every test.
# Both do all of the set-up themselves, in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# The torch release that the tests run on; constraints.txt pins the same one.
TORCH  ?= torch==2.13.0
# How many files of tests run at once. Each may start several processes.
JOBS   ?= 2

# An independent Solana validator stand-in and the JavaScript client, for `make contract-surfpool`; it needs node and npm.
NODE_MODULES := build/contract
SURFPOOL := @solana/surfpool-linux-x64-gnu@1.5.0
WEB3_JS  := @solana/web3.js@1.99.0

.PHONY: demo test nat-tools nightly contract-surfpool setup lint program proto docs bench clean

demo: setup
	$(BIN)/psyche-sim $(ARGS)

test: setup lint nat-tools
	$(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# The tests of nodes behind NAT need root, iproute2 and nftables. Without them they are skipped.
nat-tools:
	@for tool in ip:iproute2 nft:nftables; do \
	  command -v $${tool%%:*} >/dev/null && continue; \
	  package=$${tool##*:}; \
	  { [ "$$(id -u)" = 0 ] && { apt-get install -qq -y $$package || { apt-get update -qq && apt-get install -qq -y $$package; }; } >/dev/null 2>&1; } \
	    || echo "skipped: the tests of nodes behind NAT, since $$package cannot be installed (apt-get install $$package, as root)"; \
	done

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(wildcard optimizer/native/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "psyche-node needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Set PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Installing PyTorch ($(TORCH)) and the packages of constraints.txt into $(VENV), once: about 3 GB and some minutes"
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
	$(BIN)/python -m benchmarks.ledger
	$(BIN)/python -m benchmarks.ledger_restart
	$(BIN)/python -m benchmarks.network
	$(BIN)/python -m benchmarks.network_fanout
	$(BIN)/python -m benchmarks.network_gossip
	$(BIN)/python -m benchmarks.overlap

# What takes too long for every change: a million inputs each for the decoder of updates, for the program's arithmetic
# and for its instructions, and for what reads the network (also guided by coverage, where atheris can be had), ten
# thousand schedules of a run, replicas over rank layouts for 500 rounds, 50 kills of a ledger under load, and a node
# without a network for ten minutes.
nightly: setup
	$(BIN)/python tests/optimizer/codec_fuzzing.py 1000000
	$(BIN)/python tests/coordinator/program/arithmetic_check.py 1000000
	$(BIN)/python tests/coordinator/program/program_fuzzing.py 1000000
	$(BIN)/python tests/coordinator/program/schedules.py 10000
	REPLICA_ROUNDS=500 $(BIN)/pytest -q tests/optimizer/test_sharding.py tests/optimizer/test_engines.py -k 'for_long or many_rounds' --timeout 1800
	$(BIN)/python tests/coordinator/ledger/kill_ledger.py 50
	$(BIN)/python tests/network/fuzzing.py 1000000
	$(BIN)/python tests/network/fuzzing.py 1000000 --coverage
	$(BIN)/python tests/network/cut_off.py 600

# The contract of Solana's RPC over psyche-ledger and over Surfpool (Linux, x86-64).
contract-surfpool: setup
	@command -v node >/dev/null && command -v npm >/dev/null || { echo "skipped: make contract-surfpool needs node and npm on the PATH"; exit 0; }; \
	if [ "$$(uname -sm)" != "Linux x86_64" ]; then echo "skipped: Surfpool's package is for Linux on x86-64 only"; exit 0; fi; \
	npm install --silent --no-audit --no-fund --prefix $(NODE_MODULES) $(SURFPOOL) $(WEB3_JS) || { echo "skipped: npm could not install Surfpool; is a registry reachable?"; exit 0; }; \
	PSYCHE_CONTRACT_MODULES=$(NODE_MODULES) $(BIN)/pytest tests/coordinator/ledger/test_contract.py

docs: setup
	$(BIN)/python docs/generate.py
	$(BIN)/python -m coordinator.idl

clean:
	rm -rf $(VENV) build runs
