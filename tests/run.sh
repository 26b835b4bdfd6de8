#!/usr/bin/env bash
# Every check: format, lint, import layers, types, tests. Sets up .venv in the checkout first.
# Arguments go to pytest, e.g. tests/run.sh tests/core -k sae; without any, two workers run all tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# A Mac has no vLLM, which the type check and most tests need.
if [ "$(uname -s)" = Darwin ]; then extras=demo,dev,hf; else extras=demo,dev; fi
examples/setup.sh .venv "$extras"
export PATH="$PWD/.venv/bin:$PATH"
unset PYTHONPATH

if ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  echo "setup: installing Chromium for the tests of pages" >&2
  { apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null
fi
if [ $# = 0 ]; then set -- -n 2 --dist loadscope --no-loadscope-reorder; fi

step() { echo "== $*" >&2; "$@"; }
if [ "$extras" = demo,dev,hf ]; then exec python -m pytest "$@"; fi
step ruff format --check .
step ruff check .
step lint-imports
step pyright
step python -m pytest "$@"
