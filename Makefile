# Two commands: `make demo` installs and runs the main job; `make test` installs and passes the tests.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
UV_VERSION := 0.13.9
# --compile-bytecode below: where Python may not write its own (PYTHONDONTWRITEBYTECODE), every start would compile anew
# uv does not read pip's settings: hand over the folder of wheels that this machine's pip may know
comma := ,
PIP_WHEELS := $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
export UV_FIND_LINKS ?= $(subst $() ,$(comma),$(strip $(PIP_WHEELS)))
ifeq ($(strip $(UV_FIND_LINKS)),)
unexport UV_FIND_LINKS
endif
export DO_NOT_TRACK = true

.PHONY: demo test up down status lint format types contracts check bench lock clean

demo: $(VENV)/.ok  ## install, then run the main job
	$(BIN)/thumbwheel demo

test: $(VENV)/.ok  ## install, then run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

up: $(VENV)/.ok  ## start the servers, the deployment runner and the bell, and keep them
	$(BIN)/thumbwheel up

down: $(VENV)/.ok
	$(BIN)/thumbwheel down

status: $(VENV)/.ok
	$(BIN)/thumbwheel status

lint: $(VENV)/.ok
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.ok
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.ok
	$(BIN)/mypy

contracts: $(VENV)/.ok
	$(BIN)/lint-imports

check: lint types contracts test

bench: $(VENV)/.ok  ## race against transformers and TRL at 1 M parameters: an hour or two, then docs/benchmarks.md
	$(BIN)/python -m benchmarks.speed; raced=$$?; $(BIN)/python -m benchmarks.speed_page && exit $$raced

$(VENV)/.ok: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 to 3.13 is needed, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12") if not (3, 11) <= sys.version_info[:2] <= (3, 13) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'
	touch $@

# UV_FIND_LINKS is unset here: a local build of torch would be written into the pins
lock: $(VENV)/.ok
	env -u UV_FIND_LINKS $(BIN)/uv pip compile -q --universal --python-version 3.11 --no-header --no-annotate --all-extras pyproject.toml -o constraints.txt

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
