# Each target makes what it needs: .venv with everything from the package index.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test proofs lint clean

demo: .venv/installed
	$(BIN)/patchscale sweep --study studies/digits.toml --output demo_output
	$(BIN)/patchscale report demo_output --out demo_output/report.html

test: .venv/installed
	$(BIN)/python -m pytest -q -n 2 -m "not slow"

# What takes half a minute or more each: kills, several processes, long sequences, a Slurm of our own.
proofs: .venv/installed
	$(BIN)/python -m pytest -q -n 2 -m slow

lint: .venv/installed
	$(BIN)/ruff check src tests examples benchmarks
	$(BIN)/ruff format --check src tests examples benchmarks
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror src/patchscale/ops/native/*.cpp src/patchscale/ops/native/*.hpp

.venv/installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'patchscale needs Python 3.11 or newer: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs demo_output build dist src/*.egg-info
