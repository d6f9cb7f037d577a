# make demo   everything from nothing: environment, tiny model, SFT -> PPO with a target KL -> eval-kl
# make test   the tests
# make stress every architecture of transformers and every kind of adapter of PEFT, held against plain transformers;
#             kills, exits, power cuts and full disks at every moment of every stage
#             400 odd and hostile folders
# A python of another name: make demo PYTHON=python3.12

PYTHON ?= python3
VENV   ?= .venv
DEMO   ?= kltune-demo
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test stress lint bench-peers clean

demo: $(READY)
	$(BIN)/kltune demo --output $(DEMO)

# One thread per worker: two workers that use both cores each are slower than one.
test: $(READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist loadfile

stress: $(READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto -m stress

lint: $(READY)
	$(BIN)/ruff check .

# TRL in environments of its own under build/peers; equal numbers first, then seconds and memory. Hours; never a test.
bench-peers: $(READY)
	$(BIN)/python scripts/bench_peers.py

# pip older than 25 resolves the pinned set more slowly and with more noise; the environment gets its own.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "kltune needs Python 3.11 or newer; this one is %d.%d. Try: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev,tensorboard]'
	@touch $@

clean:
	rm -rf $(VENV) $(DEMO)
