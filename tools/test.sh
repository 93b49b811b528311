#!/usr/bin/env bash
# Set up and run the whole test suite, a process of one thread on each of up to eight cores; arguments go to pytest.
source "$(dirname "$0")/setup.sh" dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
