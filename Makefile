# Two commands do everything on a fresh machine with Python 3.11: `make demo` and `make test`.
PYTHON ?= python3.11
BIN := .venv/bin
RUNS := .venv/.runs
INSTALLED := .venv/.installed
TRL := benchmarks/trl/.venv/.installed
VERIFIERS := .venv/verifiers/.installed
TRITON := .venv/triton/.installed

.PHONY: demo service continual test whole chaos models bench docs lint install clean

demo: $(RUNS)
	$(BIN)/sdft train examples/tools/tools.yaml

# A service that learns from corrections, refuses poisoned ones, and rolls back.
service: $(RUNS)
	$(BIN)/python examples/service/demonstrate.py

# Three skills in sequence by SDFT and by SFT, compared, in under an hour; goes on where it was stopped. FULL=--full: all
# methods, rates, seeds and experiments.
continual: $(RUNS)
	$(BIN)/python examples/continual/sweep.py $(FULL)

test: install
	$(BIN)/python -m pytest -n 2

# Every test, also those that take half a minute or more and have a faster one near.
whole: install $(VERIFIERS) $(TRITON)
	SDFT_TESTS=whole $(BIN)/python -m pytest -n 2

# The tests in tests/runs/chaos with 200 kills each instead of 12 and 30: three quarters of an hour.
chaos: install
	CHAOS_KILLS=200 SERVICE_KILLS=200 $(BIN)/python -m pytest tests/runs/chaos

# Every family of models; writes docs/models.md.
models: install
	$(BIN)/python -m tests.models.matrix

# Alone on the machine: anything else that runs is in the figures.
bench: install $(TRL)
	$(BIN)/python -m benchmarks.learner_step
	$(BIN)/python -m benchmarks.loss
	$(BIN)/python -m benchmarks.packing
	$(BIN)/python -m benchmarks.scoring
	$(BIN)/python -m benchmarks.rollouts
	$(BIN)/python -m benchmarks.snapshots
	$(BIN)/python -m benchmarks.gradient
	$(BIN)/python -m benchmarks.changed
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.data_plane
	$(BIN)/python -m benchmarks.ahead
	$(BIN)/python -m benchmarks.peer
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.turns

# The documents as a site, in build/docs.
docs: install
	$(BIN)/python -m sphinx -q -W --keep-going docs build/docs
	@echo build/docs/index.html

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2
	$(BIN)/lint-imports

install: $(INSTALLED)

# What a run needs.
$(RUNS): requirements/cpu.txt requirements/install.sh pyproject.toml
	PYTHON=$(PYTHON) requirements/install.sh .venv requirements/cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(RUNS)

# What tests and checks need, too.
$(INSTALLED): $(RUNS) requirements/dev.txt requirements/docs.txt requirements/harness.txt
	PYTHON=$(PYTHON) requirements/install.sh .venv requirements/dev.txt requirements/docs.txt requirements/harness.txt
	touch $(INSTALLED)

# The library of an environment that is tested with its own interpreter.
$(VERIFIERS): $(RUNS) requirements/verifiers.txt
	PYTHON=$(PYTHON) requirements/install.sh .venv/verifiers requirements/verifiers.txt
	touch $(VERIFIERS)

# Beside the environment, not in it: vLLM for CPUs would find it and try to use it.
$(TRITON): $(RUNS) requirements/triton.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/triton --requirement requirements/triton.txt
	touch $(TRITON)

# The peer of benchmarks/peer.py.
$(TRL): benchmarks/trl/requirements.txt
	PYTHON=$(PYTHON) requirements/install.sh benchmarks/trl/.venv benchmarks/trl/requirements.txt
	touch $(TRL)

clean:
	rm -rf .venv benchmarks/trl/.venv runs
