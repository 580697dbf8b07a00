PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-all lint bench clean

setup: .venv/.done

# Everything is pinned by constraints.txt; the stamp makes the second call instant.
.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, this is %s" % sys.version'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lpips]'
	touch $@

demo: setup
	$(BIN)/ldm-sg demo --out runs/demo

test: setup lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: setup lint
	$(BIN)/python -m pytest -m ''

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	for bench in benchmarks/bench_*.py; do echo "== $$bench"; $(BIN)/python $$bench; done

clean:
	rm -rf .venv runs/demo runs/demo-data
