PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-all lint audit bench gpu-bundle clean

setup: .venv/.done

# Everything is pinned by constraints.txt; the stamp makes the second call instant.
.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, this is %s" % sys.version'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,test,lpips]'
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

# Known vulnerabilities of all that is installed, by pip-audit in an environment of its own; it asks for them over the network.
audit: setup
	test -x .venv/audit/bin/pip-audit || { $(PYTHON) -m venv .venv/audit && .venv/audit/bin/pip install --quiet pip-audit; } \
		|| { echo "make audit: pip-audit cannot be installed, nothing was checked: is there a network?" >&2; exit 2; }
	$(BIN)/python -m pip list --format=freeze --exclude-editable | sed 's/+.*//' > .venv/audit/all.txt
	.venv/audit/bin/pip-audit --strict --disable-pip --no-deps -r .venv/audit/all.txt 2> .venv/audit/log \
		|| { tail -n 1 .venv/audit/log >&2; echo "make audit: something is known, or could not be asked (no network?)" >&2; exit 2; }

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
