# make env: the environment alone · make run: the main job · make test: lint, types, tests
# make test-slow: runs that are killed and stopped at random, 20 times each; a whole pipeline twice
# make bench: what everything costs, compared with the last committed figures
# Options go through ARGS, e.g.  make run ARGS="--help"   make test ARGS="tests/losses -k dpo"
# Another interpreter: make run PYTHON=/path/to/python3.12
ARGS ?=
WORKERS ?= 2

CHECK := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
# The first Python of a fitting version that can make a virtual environment, else any fitting one.
PYTHON ?= $(shell for test in '$(CHECK) or __import__("ensurepip") is None' '$(CHECK)'; do \
  for p in python3.11 python3.12 python3 python; do \
    $$p -c "$$test" >/dev/null 2>&1 && echo $$p && exit; done; done)

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input -q
# The data files of this wheel are read; its code is never imported, so no dependency comes along.
ROBOTHOW := virtualhome-eval==0.1.1
# Two makes in one clone: the second waits for the first and finds the work done.
LOCK := $(if $(shell command -v flock),flock pyproject.toml,)

.PHONY: env run bench test test-slow lint clean
.DELETE_ON_ERROR:

env: .venv/.stamp .venv/.robothow

.venv/.stamp: pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
	  echo "egjax needs Python 3.11 or 3.12; install one or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 2; fi
	@$(LOCK) sh -c 'set -e; \
	  if [ .venv/.stamp -nt pyproject.toml ]; then exit 0; fi; \
	  echo "setting up .venv with $(PYTHON): a minute or two, 1.3 GB"; \
	  if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	    if [ -e .venv ]; then $(PY) -m ensurepip >/dev/null 2>&1 || { \
	      echo ".venv is there without pip, of another tool or half made: move it away, or put pip into it" >&2; exit 2; }; \
	    else $(PYTHON) -c "import ensurepip, venv" 2>/dev/null || { \
	      echo "$(PYTHON) cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv" >&2; exit 2; }; \
	    $(PYTHON) -m venv .venv; fi; \
	  fi; \
	  $(PIP) install -e ".[all,test]"; \
	  touch .venv/.stamp'

# Tried again by the next make where it could not be had.
.venv/.robothow: .venv/.stamp
	@$(LOCK) sh -c 'if [ .venv/.robothow -nt .venv/.stamp ]; then exit 0; fi; \
	  if $(PIP) --retries 1 install --no-deps "$(ROBOTHOW)"; then touch .venv/.robothow; \
	  else echo "RobotHow data ($(ROBOTHOW)) could not be had: the embedded household serves instead" >&2; fi'

run: env
	$(PY) -m experiments.pipeline $(ARGS)

bench: env
	$(PY) -m experiments.bench $(ARGS)

lint: env
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright --pythonpath $(PY)

test: lint
	$(PY) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

# Minutes rather than seconds, so not a part of test.
test-slow: env
	$(PY) -m pytest -m slow $(ARGS)

clean:
	rm -rf .venv build dist
