PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-all lint bench gpu-bundle clean

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

# What a GPU machine without network lacks, for `bash benchmarks/gpu/check.sh` there.
gpu-bundle:
	$(PYTHON) -m pip download --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp --python-version 3.12 \
		$(foreach tag,2_28 2_27 2_17 2014,--platform manylinux$(patsubst 2_%,_2_%,$(tag))_x86_64) \
		-c constraints.txt -r benchmarks/gpu/requirements.txt -d benchmarks/gpu/wheels
	du -sh benchmarks/gpu/wheels

clean:
	rm -rf .venv runs/demo runs/demo-data
