#!/bin/bash
# One page on how ldm_sg does on this machine's GPU, in at most nine minutes and without network:
#   bash benchmarks/gpu/check.sh [--out DIR] [--only train,sample] [--tiny] [--device cuda]
# Before it, where there is network: `make gpu-bundle` fills benchmarks/gpu/wheels with what the machine may lack.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT

# Only what is not there already goes into a folder in front of the path: the machine's own torch stays as it is. (A venv with
# --system-site-packages would not see the packages of a python3 that lives in a venv itself.)
missing=$("$python" - "$here/wheels" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

for wheel in sorted(Path(sys.argv[1]).glob("*.whl")):
    try:
        version(wheel.name.split("-")[0])
    except PackageNotFoundError:
        print(wheel)
PY
)
if [ -n "$missing" ]; then
    echo "installing: $missing" | sed "s|$here/wheels/||g"
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" $missing
fi
export PYTHONPATH="$root:$site${PYTHONPATH:+:$PYTHONPATH}"
if ! "$python" -c 'from importlib.metadata import version; version("ldm-sg")' 2>/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --no-compile --target "$site" "$root"
fi
cd "$root"
"$python" "$here/check.py" "$@"
