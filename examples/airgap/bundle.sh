#!/usr/bin/env bash
# Wheels for an offline CUDA host (see requirements.txt), as parts of at most 60 MB.
#   examples/airgap/bundle.sh OUT      where a package registry can be reached
# Makes OUT/wheels.tar.000 and so on, OUT/SHA256SUMS of the parts, and OUT/MANIFEST of the wheels. Bring
# them and a checkout to the host; gpu.sh goes on there.
set -euo pipefail
[ $# = 1 ] || { echo "usage: $0 OUT" >&2; exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
if [ -n "$(ls -A "$out")" ]; then
  echo "$out is not empty; give a new folder, so that no part of another bundle is taken for one of this." >&2
  exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip() { "${PYTHON:-python3}" -m pip --disable-pip-version-check "$@"; }

# pip takes the names of old platforms literally, and older wheels bear older names.
platforms=()
for name in manylinux_2_31 manylinux_2_28 manylinux_2_17 manylinux2014 manylinux_2_12 manylinux_2_5 manylinux1; do
  platforms+=(--platform "${name}_x86_64")
done
pip download -q --no-deps --only-binary=:all: --python-version 3.12 "${platforms[@]}" \
  --dest "$work/wheels" --requirement "$root/examples/airgap/requirements.txt"
# From a copy: setuptools would take up what an earlier build left in the checkout.
mkdir "$work/source"
cp -r "$root"/{pyproject.toml,README.md,LICENSE,neuroscope_vllm} "$work/source"
pip wheel -q --no-deps --wheel-dir "$work/wheels" "$work/source"

(cd "$work/wheels" && sha256sum -- *.whl) >"$out/MANIFEST"
tar -C "$work/wheels" --sort=name --owner=0 --group=0 --mtime=@0 -cf - . |
  split --bytes=60MB --numeric-suffixes --suffix-length=3 - "$out/wheels.tar."
(cd "$out" && sha256sum -- wheels.tar.*) >"$out/SHA256SUMS"
echo "$(wc -l <"$out/MANIFEST") wheels in $(wc -l <"$out/SHA256SUMS") parts, $(du -sh --apparent-size "$out" | cut -f1): $out"
