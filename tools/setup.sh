# Sourced by demo.sh and test.sh, with the extras they need: a virtual environment with groktrace, pinned to what is tested.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
stamp=.venv/.groktrace-$1-$(cat pyproject.toml tools/constraints.txt | cksum | cut -d' ' -f1)
if [ ! -f "$stamp" ]; then
    echo "Setting up .venv (once; a few minutes, most of it PyTorch) ..."
    "$PYTHON" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c tools/constraints.txt torch
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c tools/constraints.txt -e ".[$1]"
    touch "$stamp"
fi
