# Both commands make their own environment in .venv; PYTHON picks the interpreter.
PYTHON ?= python3
BIN := .venv/bin
# One more than there are cores: a third of the tests' time is waiting for a service.
WORKERS := $(shell echo $$(($$(nproc) + 1)))

.PHONY: demo test lint install clean

demo: install
	$(BIN)/python tests/demo.py

# PyTorch's threads, of as many processes, would mostly wait for each other.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder \
		-m "not alone"
	$(BIN)/python -m pytest -m alone

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; name one with PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[train,dev]' --constraint constraints.txt
	touch $@

clean:
	rm -rf .venv demo-run
