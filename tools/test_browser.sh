#!/usr/bin/env bash
# The live view in a browser: needs Chromium (apt-get install chromium chromium-driver), and fetches
# selenium to a directory of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup_venv.sh
packages=build/browser
[ -d "$packages/selenium" ] || .venv/bin/python -m pip --quiet install --target "$packages" selenium
PYTHONPATH="$packages" exec .venv/bin/python -m pytest -q -ra tests/process/test_live_view.py
