#!/usr/bin/env bash
# On an offline CUDA host: install what bundle.sh made, run the GPU tests, measure.
#   examples/airgap/gpu.sh BUNDLE OUT [install] [test] [bench]      all three by default
# Makes OUT/venv, which sees the host's own packages (PYTHON: its Python, python3.12), OUT/tests.log, figures as
# OUT/*.json, and OUT/figures.md. A test or bench that fails leaves the rest to run, and figures of earlier runs stay
# until theirs is measured again.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 BUNDLE OUT [install] [test] [bench]" >&2; exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
bundle=$(cd "$1" && pwd)
mkdir -p "$2"
out=$(cd "$2" && pwd)
shift 2
steps=("$@")
[ $# -gt 0 ] || steps=(install test bench)
wheels=$out/wheels python=$out/venv/bin/python
export PATH="$out/venv/bin:$PATH" HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_USE_V2_MODEL_RUNNER=1
failed=()

run_install() {
  (cd "$bundle" && sha256sum --quiet --check SHA256SUMS)
  rm -rf "$wheels" && mkdir "$wheels"
  cat "$bundle"/wheels.tar.* | tar -C "$wheels" -xf -
  (cd "$wheels" && sha256sum --quiet --check "$bundle/MANIFEST")
  [ -x "$python" ] || "${PYTHON:-python3.12}" -m venv --system-site-packages "$out/venv"
  "$python" -c 'import torch, triton, transformers' || {
    rm -rf "$out/venv"
    echo "A venv of ${PYTHON:-python3.12} does not see torch, triton and transformers: it sees what is installed for the base Python, and not for another venv; set PYTHON to a Python that has them." >&2
    exit 1
  }
  pip() { "$python" -m pip --disable-pip-version-check "$@" --no-index --no-deps --find-links "$wheels"; }
  pip install -q --requirement "$root/examples/airgap/requirements.txt"
  pip install -q --force-reinstall neuroscope-vllm
  # Some of it is left out on purpose; what else is missing is the first thing to know if vLLM fails.
  "$python" -m pip check >"$out/pip-check.txt" || echo "not installed, or in another version: $out/pip-check.txt" >&2
  "$python" -c 'import torch, vllm; print(torch.cuda.get_device_name(), "torch", torch.__version__, "vllm", vllm.__version__)'
}

run_test() {
  (cd "$root" && "$python" -m pytest tests/gpu -p no:cacheprovider -v 2>&1) | tee "$out/tests.log"
}

overhead() {
  local name=$1
  shift
  rm -f "$out/$name.json"
  neuroscope bench overhead --shape gemma-2-2b --batch 1,8,32,128 --json "$out/$name.json" "$@" -- \
    --compilation-config '{"cudagraph_mode": "FULL"}'
}

run_bench() {
  "$python" -c 'import torch; print(torch.cuda.get_device_name())' >"$out/card.txt"
  overhead overhead || failed+=("bench overhead")
  overhead overhead-steered --steered all || failed+=("bench overhead --steered all")
  rm -f "$out/encode.json"
  neuroscope bench encode --device cuda --json "$out/encode.json" || failed+=("bench encode")
  "$python" "$root/examples/airgap/figures.py" "$out" >"$out/figures.md"
  cat "$out/figures.md"
}

for step in "${steps[@]}"; do
  case $step in
    install) run_install ;;
    test) run_test || failed+=("tests/gpu") ;;
    bench) run_bench ;;
    *) echo "$step is no step: install, test or bench." >&2; exit 2 ;;
  esac
done
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
