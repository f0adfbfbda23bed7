#!/usr/bin/env bash
# Line coverage of fastserve_mega by the tests of `make test`, ranks and servers they start included.
# Fails below the floor in setup.cfg ([coverage:report]). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup_venv.sh
export PATH="$PWD/.venv/bin:$PATH"
python tools/fetch_smollm2.py
python -m pytest -m "not gpu and not slow" -n "${TEST_PROCESSES:-3}" --dist loadfile \
    --no-loadscope-reorder --cov=fastserve_mega --cov-report=term-missing:skip-covered "$@"
