# Two commands do everything on a fresh machine with only Python (3.10 or newer), make and a shell:
#   make demo    make test
PYTHON ?= python3
VENV ?= .venv
OLDEST := $(VENV)-oldest
BIN := $(VENV)/bin
WORKERS ?= 2
MINUTES ?= 1
PIP := -m pip install --quiet --disable-pip-version-check

# What runs every branch of the mathematics (bounds, codecs, ladder, records).
COVERING := $(addprefix tests/test_,bounds.py codecs.py ladder.py records.py)

.PHONY: demo test lint unit coverage verify oldest measure quality bench clean

demo: $(VENV)/.installed
	$(BIN)/certkv demo --out demo_out

test: lint unit

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# All tests, each once: those that are counted, and the others.
unit: coverage
	$(BIN)/python -m pytest -n $(WORKERS) $(addprefix --ignore=,$(COVERING))

# Fails where a branch of the four modules named in pyproject.toml is not run.
coverage: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) $(COVERING) --cov

# The behaviour tests on the oldest transformers that is supported.
oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) tests/test_generate.py tests/test_layers.py tests/test_handles.py

# A short attack on the certificate: every part does a little (docs/soundness.md).
verify: $(VENV)/.installed
	$(BIN)/certkv verify --minutes $(MINUTES)

# The figures of docs/measurements.md (about an hour on two cores); TEXT is a book as plain text.
measure: $(VENV)/.installed
	$(BIN)/python -m benchmarks.measure all $(if $(TEXT),--text $(TEXT))

# What caches do to the embedded models' answers: docs/quality.md, the README's table and the model cards (about an hour on two
# cores; what was measured before is kept); TEXT is a book as plain text.
quality: $(VENV)/.installed
	$(BIN)/python -m benchmarks.quality measure --text $(TEXT)

# The figures of docs/benchmarks.md: two threads, all systems in turns, the longest context 128K.
bench: $(VENV)/.installed
	$(BIN)/python $(PIP) -c constraints.txt -e ".[bench]"
	$(BIN)/python -m benchmarks.speed measure --threads 2

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) -c constraints.txt -e ".[test]"
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -vE '^(transformers|huggingface_hub|tokenizers)==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python $(PIP) -c $(OLDEST)/constraints.txt -e ".[test]" transformers==5.17.0
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) demo_out
