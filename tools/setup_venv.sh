#!/usr/bin/env bash
# Creates .venv with everything pinned in constraints.txt; does nothing when it is current.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
stamp=.venv/installed-from
native=fastserve_mega/worker/native
wanted="$(cat setup.cfg setup.py constraints.txt "$native"/*.{h,inl,cpp} | sha256sum)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi

echo "Setting up .venv (once; a few minutes, several hundred MB)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
# torch first and by its pin: resolved together with the rest, pip may take a newer CUDA build of
# several GB. On a machine without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu keeps
# the download small.
torch="$(grep '^torch==' constraints.txt)"
.venv/bin/python -m pip --quiet install --disable-pip-version-check \
    ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch"
.venv/bin/python -m pip --quiet install --disable-pip-version-check \
    --constraint constraints.txt --editable '.[test]'
printf '%s' "$wanted" > "$stamp"
