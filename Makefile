# Two commands do everything on a fresh machine with only Python (3.10 or newer), make and a shell:
#   make demo    make test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test lint unit measure clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/certkv demo --out demo_out

test: lint unit

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS)

# The committed figures in benchmarks/results and docs/measurements.md (about an hour on two cores).
measure: $(VENV)/.installed
	$(BIN)/python -m benchmarks.measure

clean:
	rm -rf $(VENV) demo_out
