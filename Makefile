# The two commands: `make demo` and `make test`. Both set up `.venv` first, once.
#   PYTHON=python3.12   the interpreter to build .venv with (3.11 or newer)
#   TORCH=torch==2.13.0 the build of torch to install (any >= 2.11)

PYTHON ?= python3
TORCH ?= torch==2.13.0
RECIPE ?= recipes/quickstart.yaml
BIN := .venv/bin
NATIVE := CMakeLists.txt $(wildcard csrc/* csrc/*/*)

.PHONY: demo test setup lint peers clean

demo: setup
	$(BIN)/sparsemill run $(RECIPE)

# Several processes share the files of tests. Threads that spin while they wait would slow the others down.
test: .venv/.dev
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

setup: .venv/.ready

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports

# torch first and by itself, so that its build is chosen here and not by another package's
# requirements; where pip is set up with an index of CPU builds, that is the one it takes.
.venv/.ready: pyproject.toml $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[quickstart]'
	@touch $@

.venv/.dev: .venv/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

# The libraries that `python -m benchmarks.step` measures and tests/external compares with. They have
# an environment of their own, so that what they ask for changes nothing in ours; it holds Sparsemill
# without its requirements, and pytest:
#   .venv-peers/bin/python -m pytest tests/external/test_step_parity.py
# dictionary-learning's own requirements are far wider, and older, than what it imports.
PEERS := sae-lens==6.54.12 eai-sparsify==1.3.3 einops nnsight==0.8.1 tqdm pytest pytest-timeout

peers: .venv-peers/.ready

.venv-peers/.ready: pyproject.toml $(NATIVE)
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check $(PEERS)
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  dictionary-learning==0.1.0 -e .
	@touch $@

clean:
	rm -rf .venv .venv-peers build
