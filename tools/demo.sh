#!/usr/bin/env bash
# Serves SmolLM2-135M on two ranks and shows what skip-join MLFQ does for short requests.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup_venv.sh
export PATH="$PWD/.venv/bin:$PATH"
model="$(python tools/fetch_smollm2.py | tail -n 1)"
exec python tools/demo.py --config configs/smollm2-135m-cpu.yaml --set "model.path=$model" "$@"
