#!/usr/bin/env bash
# The GPU kernels without a GPU: in Triton's interpreter, and compiled for an H100. Fetches Triton
# (the extra `kernels`, by its pin) to a directory of its own: without it these tests are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup_venv.sh
packages=build/kernels
pin="$(sed -n 's/^ *\(triton==.*\)$/\1/p' setup.cfg)"
[ -d "$packages/triton" ] || .venv/bin/python -m pip --quiet install --no-deps --target "$packages" "$pin"
PYTHONPATH="$packages" exec .venv/bin/python -m pytest -q -ra tests/unit/kernels \
    tests/unit/worker/test_copy_order.py "$@"
