#!/usr/bin/env bash
# Every check: format, lint, import layers, types, tests. Sets up .venv in the checkout first.
# Arguments go to pytest, e.g. tests/run.sh tests/core -k sae; without any, two workers run all tests.
#   tests/run.sh --matrix [VERSION ...]   some of vLLM's tests on other versions of its CPU build,
#                                         each set up in .venv-vllm-VERSION (about 1.5 GB)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH
step() { echo "== $*" >&2; "$@"; }

if [ "${1:-}" = --matrix ]; then
  shift
  [ $# -gt 0 ] || set -- 0.27.1 0.30.0
  # Served on V1, compiled; offline; V1 and V2 patched; what is refused; the front process. Without
  # chats on V2: Triton's interpreter has no log1p, with which 0.30 draws tokens.
  smoke=(tests/vllm/test_truth.py tests/vllm/test_offline.py tests/vllm/test_patches.py
    tests/vllm/test_refusals.py tests/vllm/test_front.py)
  for version in "$@"; do
    examples/setup.sh ".venv-vllm-$version" demo,dev "$version"
    PATH="$PWD/.venv-vllm-$version/bin:$PATH" step python -m pytest "${smoke[@]}" -k "not (test_truth and v2)"
  done
  exit
fi

# A Mac has no vLLM, which the type check and most tests need.
if [ "$(uname -s)" = Darwin ]; then extras=demo,dev,hf; else extras=demo,dev; fi
examples/setup.sh .venv "$extras"
export PATH="$PWD/.venv/bin:$PATH"

if ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  echo "setup: installing Chromium for the tests of pages" >&2
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -y -qq -o Acquire::Retries=3 chromium; } >/dev/null
fi
if [ $# = 0 ]; then set -- -n 2 --dist loadscope --no-loadscope-reorder; fi
if [ "$extras" = demo,dev,hf ]; then exec python -m pytest "$@"; fi
step ruff format --check .
step ruff check .
step lint-imports
step pyright
step python -m pytest "$@"
