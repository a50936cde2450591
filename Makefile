# make demo   set up, then train and sample the embedded teacher's student; the pictures land in $(OUT)
# make test   set up, then lint, types and the tests: about fifteen minutes on two cores
# make lint   ruff and mypy only
# make venv   set up only
# make clean  remove what the above made, except demo runs

OUT ?= demo-run
# PYTHON, if given, is tried first; any Python from 3.11 on will do.
PYTHONS = $(PYTHON) python3.11 python3.12 python3.13 python3
BIN = .venv/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

# Threads that wait should sleep: spinning ones steal the cores of a small machine.
export OMP_WAIT_POLICY = PASSIVE
# glibc maps and unmaps every large tensor anew unless told to keep the memory; page faults then cost a fifth.
export MALLOC_MMAP_THRESHOLD_ = 4294967296
export MALLOC_TRIM_THRESHOLD_ = 17179869184
export MALLOC_TOP_PAD_ = 268435456

.PHONY: demo test lint venv clean

demo: venv
	$(BIN)/scalewise demo --out $(OUT)

# Files of tests are spread over the cores, one thread each.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || for python in $(PYTHONS); do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  echo "setting up .venv with $$python; the first time takes some minutes"; \
	  "$$python" -m venv --clear .venv && break; \
	done; true
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf .venv; \
	  echo "Found no Python >= 3.11 with the venv module; name one: make venv PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }
# torch first and by number, so that a CPU wheel is taken where one is offered; Linux's wheels on PyPI bring CUDA.
	$(PIP) --quiet "torch==2.13.0"
	$(PIP) --quiet --editable ".[dev]"
# Its Inception needs no torchvision, whose wheels bring another torch.
	$(PIP) --quiet --no-deps "torch-fidelity==0.4.0"
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
