#!/usr/bin/env bash
# The system of the demo, kept in the foreground. Ctrl-C ends every process.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup_venv.sh
export PATH="$PWD/.venv/bin:$PATH"
model="$(python tools/fetch_smollm2.py | tail -n 1)"
exec fastserve-mega serve --config configs/smollm2-135m-cpu.yaml --set "model.path=$model" "$@"
