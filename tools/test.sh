#!/usr/bin/env bash
# Format, lint, types, import layers, and every test that needs no GPU. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup_venv.sh
export PATH="$PWD/.venv/bin:$PATH"
python tools/fetch_smollm2.py

echo "== format";  ruff format --check .
echo "== lint";    ruff check .
echo "== types";   mypy
echo "== layers";  lint-imports
echo "== tests";   python -m pytest -m "not gpu" "$@"
