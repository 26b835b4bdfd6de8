#!/usr/bin/env bash
# Every check: format, lint, import layers, types, tests. Sets up .venv in the checkout first.
# Arguments go to pytest, e.g. tests/run.sh tests/core -k sae
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
examples/setup.sh .venv demo,dev
export PATH="$PWD/.venv/bin:$PATH"
unset PYTHONPATH

step() { echo "== $*" >&2; "$@"; }
step ruff format --check .
step ruff check .
step lint-imports
step pyright
step python -m pytest "$@"
