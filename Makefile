# `make demo` and `make test` each set everything up by themselves; nothing else is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

BENCH ?=

# Compiled modules are kept: the suite starts hundreds of processes, each of which would compile them.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install demo test test-fast test-export-matrix format check bench bench-training bench-export bench-bundles lock lock-peers clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "policyserve needs Python 3.10 or newer; set PYTHON=python3.x"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps tritonclient==2.73.0
	@touch $(STAMP)

demo: install
	$(BIN)/policyserve demo

# Two workers: most of the suite's time is processes starting. tests/conftest.py has the order.
test: check
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

test-fast: install
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadscope --no-loadscope-reorder

# Every sensible pair of algorithm, spaces, connectors and settings, in three formats.
test-export-matrix: install
	$(BIN)/python -m tests.export.matrix --full --jobs 2 --write docs/export-matrix.md

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell

# Beside its peers, each in an environment of its own (Python 3.11 or newer); about 35 minutes, and
# less with BENCH=--quick, BENCH='--only policyserve,mosec' or BENCH=--resume.
bench: install
	$(BIN)/python -m loadtests.bench $(BENCH)

# Training beside Stable-Baselines3 (in an environment of its own) and plain RLlib, about 9 minutes;
# BENCH=--quick for a first look.
bench-training: install
	$(BIN)/python -m training.bench $(BENCH)

# What a bundle's graph costs beside the bare network, and how long an export and a load take.
bench-export: install
	$(BIN)/python -m export.bench

# Three bundles (MLP, CNN, LSTM) for `python -m serving.bench`, here or on a machine without Ray.
bench-bundles: install
	$(BIN)/python -m tests.export.bench_bundles -o build/bench-bundles

clean:
	rm -rf $(VENV) build dist demo runs .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Pin everything that the set-up installs, for every Python from 3.10 on. torch is held at the
# release that the export was tested with; what a GPU build of it needs is left to its own pins.
lock: install
	$(BIN)/python -m pip install --quiet uv
	echo 'torch==2.13.0' | $(BIN)/uv pip compile --quiet --universal --python-version 3.10 \
		--extra dev --constraint - --no-header --no-annotate --no-emit-index-url \
		--no-emit-find-links pyproject.toml | grep -vE '^(nvidia-|cuda-|triton)' > constraints.txt

# Pin the peers of `make bench` again, from what each peer's .in file names.
lock-peers: install
	$(BIN)/python -m pip install --quiet uv
	for file in loadtests/peers/requirements/*.in training/bench/requirements/*.in; do \
		$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate \
			--no-emit-index-url --no-emit-find-links $$file -o $${file%.in}.txt || exit 1; \
	done
	sed -i -E '/^(nvidia-|cuda-|triton==)/d' training/bench/requirements/sb3.txt
