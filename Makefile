# Two commands a newcomer needs: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test lint format lock proto clean

setup: $(VENV)/.ready

# Everything pinned from the lock file, then the project itself, editable.
$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else "Sightline needs Python 3.11 or newer, found %d.%d" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$$(sed -n 's/^uv==//p' requirements.lock)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

demo: setup
	$(BIN)/sightline demo

# Waiting threads sleep: two test files and the services they start share the cores.
test: setup
	OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Names and versions only: where packages come from is the installer's business.
lock:
	$(BIN)/uv pip compile --quiet --python-version 3.11 --extra dev --no-emit-index-url --no-header --no-annotate \
		--output-file requirements.lock pyproject.toml

proto: setup
	$(BIN)/python proto/generate.py

clean:
	rm -rf $(VENV) demo
