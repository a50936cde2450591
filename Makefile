# make demo   set up, then train and sample the embedded teacher's student; the pictures land in $(OUT)
# make test   set up, then lint, types and the tests: about fifteen minutes on two cores
# make lint   ruff and mypy only
# make venv   set up only
# make docs   build the documentation site into site/, which opens as site/index.html; broken links fail
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

.PHONY: demo test lint venv docs clean

demo: venv
	$(BIN)/scalewise demo --out $(OUT)

# Files of tests are spread over the cores, one thread each.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# $(call environment,FOLDER): an environment of Python >= 3.11 with pip, unless it is there already.
define environment
@$(1)/bin/python -m pip --version >/dev/null 2>&1 || for python in $(PYTHONS); do \
  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
  echo "setting up $(1) with $$python; the first time takes some minutes"; \
  "$$python" -m venv --clear $(1) && break; \
done; true
@$(1)/bin/python -m pip --version >/dev/null 2>&1 || { rm -rf $(1); \
  echo "Found no Python >= 3.11 with the venv module; name one: make $(or $(MAKECMDGOALS),venv) PYTHON=/path/to/python3.11" >&2; \
  exit 1; }
endef

venv: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(call environment,.venv)
# torch first and by number, so that a CPU wheel is taken where one is offered; Linux's wheels on PyPI bring CUDA.
	$(PIP) --quiet "torch==2.13.0"
	$(PIP) --quiet --editable ".[dev]"
# Its Inception needs no torchvision, whose wheels bring another torch.
	$(PIP) --quiet --no-deps "torch-fidelity==0.4.0"
	@touch $@

docs: .venv-docs/.ready
	.venv-docs/bin/python scripts/docs_site.py build/docs
	.venv-docs/bin/zensical build --clean --strict

# An environment of its own, which needs no torch: docstrings are read from the source.
DOCS_EXTRA = import tomllib; f = open("pyproject.toml", "rb"); \
  print(*tomllib.load(f)["project"]["optional-dependencies"]["docs"])

.venv-docs/.ready: pyproject.toml constraints.txt
	$(call environment,.venv-docs)
	.venv-docs/bin/python -c '$(DOCS_EXTRA)' > .venv-docs/extra.txt
	.venv-docs/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt \
	  $$(cat .venv-docs/extra.txt)
	@touch $@

clean:
	rm -rf .venv .venv-docs site .cache .pytest_cache .mypy_cache .ruff_cache build dist
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
