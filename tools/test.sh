#!/usr/bin/env bash
# Set up and run the whole test suite; arguments go to pytest.
source "$(dirname "$0")/setup.sh" dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest "$@"
