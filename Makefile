# make install   an environment in .venv with the locked versions (several minutes, several GB: PyTorch)
# make demo      the whole road on pictures that pip packages ship, from a web server on this machine
# make test      the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread a process: two spin against each other on a busy machine.
export OMP_NUM_THREADS ?= 1

.PHONY: install demo test lint bench clean lock

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock requirements-peers.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps --requirement requirements-peers.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: install
	$(BIN)/python -m demo.run

test: install
	$(BIN)/pytest -n 2 --dist loadfile

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: install
	for script in $(filter-out benchmarks/select.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script --quick || exit 1; done

# Renew the locked versions; a week's cool-down keeps out what was published today. requirements-peers.lock, one
# package, is renewed by hand.
lock:
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.10 --generate-hashes \
	  --constraint constraints.txt --exclude-newer "1 week" --output-file requirements.lock

clean:
	rm -rf demo-run .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build dist *.egg-info
