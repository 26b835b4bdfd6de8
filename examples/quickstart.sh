#!/usr/bin/env bash
# The main job on the embedded demo: set up, serve SmolLM2-135M, stream its features.
#   ./examples/quickstart.sh            ends in a running demo (Ctrl-C stops it)
#   ./examples/quickstart.sh --check    sends one chat, prints its features, exits 0 if all is well
# Needs Linux or macOS, python3 with venv and a package registry; no GPU and no model hub.
# PORT and FEATURES_PORT choose other ports than 8080 and 8081. On a Mac, and with
# BACKEND=transformers, transformers serves in place of vLLM.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
port=${PORT:-8080} features_port=${FEATURES_PORT:-8081}
backend=${BACKEND:-vllm}
if [ "$(uname -s)" = Darwin ]; then backend=transformers; fi
if [ "$backend" = transformers ]; then
  venv=$root/.venv-transformers extras=demo,hf
else
  venv=$root/.venv extras=demo
fi
"$root/examples/setup.sh" "$venv" "$extras"
set_up=$SECONDS

demo=("$venv/bin/neuroscope" demo --backend "$backend" --port "$port" --features-port "$features_port")
if [ "$backend" = vllm ] && ! command -v g++ >/dev/null && ! command -v c++ >/dev/null && ! command -v clang++ >/dev/null; then
  echo "quickstart: no C++ compiler here, so vLLM can not compile the model; running it eagerly" >&2
  demo+=(-- --enforce-eager)
fi

case "${1:-}" in
  --check)
    log=$(mktemp)
    "${demo[@]}" >"$log" 2>&1 &
    server=$!
    trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null || true; rm -f "$log"' EXIT
    "$venv/bin/python" "$root/examples/check_demo.py" "$port" "$features_port" "$server" "$log"
    echo "took $set_up s to set up and $((SECONDS - set_up)) s to start and check; ${venv##*/} takes $(du -sh "$venv" | cut -f1)"
    ;;
  "")
    cat >&2 <<END
Starting the demo. With vLLM the first start compiles the model and takes a few minutes. Then, in
other terminals:
  curl -N http://127.0.0.1:$features_port/v1/features/stream
  curl http://127.0.0.1:$port/v1/chat/completions -H 'Content-Type: application/json' -d \\
    '{"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "What is gravity?"}], "max_tokens": 40}'
or open http://127.0.0.1:$features_port/ and chat there.
END
    exec "${demo[@]}"
    ;;
  *)
    echo "usage: $0 [--check]" >&2
    exit 2
    ;;
esac
