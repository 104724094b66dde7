# The README's commands. Each one sets up .venv first, so that any of them works on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Two workers on two cores: a process of torch with more threads than its share slows the others down.
WORKERS ?= 2

.PHONY: demo test test-slow test-oldest lint bench bench-compare docs clean

demo: $(READY)
	$(BIN)/lightning-stability demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# The lower bounds of pyproject.toml, in an environment of their own.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt torch
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt -e ".[tuab,dev]"
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n $(WORKERS) --dist loadgroup -m "not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script --quick || exit 1; done

# The rivals from the package index are installed into an environment of their own.
bench-compare:
	$(PYTHON) -m venv .venv-compare
	.venv-compare/bin/python -m pip install --quiet --upgrade pip
	.venv-compare/bin/python -m pip install --quiet -c constraints.txt torch
	.venv-compare/bin/python -m pip install --quiet -c constraints.txt -e ".[report]"
	.venv-compare/bin/python -m pip install --quiet -c constraints.txt -r benchmarks/requirements-compare.txt
	.venv-compare/bin/python benchmarks/compare.py --json benchmarks/results/compare_cpu.json --page benchmarks/README.md

# Strict: a link or an anchor that leads nowhere is an error. (The variable silences an announcement of the theme.)
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "The site is in site/index.html"

clean:
	rm -rf $(VENV) .venv-oldest .venv-compare build dist site *.egg-info

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch alone and first, at the pinned version: a range would take the newest build with its CUDA packages
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[tuab,dev]"
	touch $@
