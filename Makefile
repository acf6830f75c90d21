# Two commands matter: `make demo` and `make test`. Both set everything up first.
# On a machine without a GPU whose package index offers only CUDA builds of torch, pass the CPU
# index of your choice: make demo PIP_ARGS="--extra-index-url URL"

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Processes that run tests; those of tests/distributed start ranks of their own.
WORKERS ?= auto
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.h csrc/*.cpp)

.PHONY: demo test test-long test-slurm audit wheel wheels image layouts lint clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not long" --ignore tests/distributed -n $(WORKERS) --dist loadfile
	$(BIN)/pytest -m "not long" tests/distributed

test-long: $(STAMP)
	$(BIN)/pytest -m long --timeout 1800

# The scripts of examples/slurm on a real SLURM of two virtual nodes; needs root. Part of test-long.
test-slurm: $(STAMP)
	$(BIN)/pytest -m slurm --timeout 1800

# Licences of all requirements, and their known vulnerabilities (asks the package index).
audit: $(STAMP)
	$(BIN)/python tools/audit.py

# A wheel for this machine and Python, in dist/.
wheel: $(STAMP)
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

# Wheels for Python 3.11 to 3.13 of this system, in dist/; on Linux this needs Docker or Podman.
wheels: $(STAMP)
	$(BIN)/cibuildwheel --output-dir dist

# The image of Containerfile; IMAGE_BASE is what it starts from.
ENGINE ?= docker
image:
	$(ENGINE) build -f Containerfile -t megaswitch $(if $(IMAGE_BASE),--build-arg BASE=$(IMAGE_BASE)) .

# Which layouts and options the tests prove to equal one process.
layouts: $(STAMP)
	$(BIN)/python -m tests.distributed.layouts

lint: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

$(STAMP): $(SOURCES)
	$(PYTHON) -c "import sys; sys.exit('MegaSwitch needs Python 3.11 or newer, this is %d.%d; pass PYTHON=python3.11' % sys.version_info[:2]) if sys.version_info < (3, 11) else None"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info megaswitch/_C*.so runs/demo
