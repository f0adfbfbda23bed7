#!/usr/bin/env bash
# Format, lint, types, import layers, and the tests that need no GPU, in three processes.
#   tools/test.sh [--long] [PYTEST ARGUMENTS]
# --long adds the slow tests and many more examples of every property.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup_venv.sh
export PATH="$PWD/.venv/bin:$PATH"
python tools/fetch_smollm2.py

marked=(-m "not gpu and not slow")
if [ "${1:-}" = --long ]; then
    shift
    marked=(-m "not gpu" --hypothesis-profile=long)
fi

# Beside each other; each one's output in one piece.
said="$(mktemp -d)"
trap 'rm -rf "$said"' EXIT
names=() processes=()
check() {
    local name="$1"
    shift
    "$@" > "$said/$name" 2>&1 &
    names+=("$name") processes+=("$!")
}
check format ruff format --check .
check lint ruff check .
check types mypy
check layers lint-imports
failed=""
for i in "${!names[@]}"; do
    wait "${processes[$i]}" || failed="$failed ${names[$i]}"
    echo "== ${names[$i]}"
    cat "$said/${names[$i]}"
done
if [ -n "$failed" ]; then
    echo "failed:$failed" >&2
    exit 1
fi

# A file's tests stay in one process and share its fixtures; files start in the order of their
# names, so that the long ones, of whole deployments, come first. Those wait for a third of their
# time, so there is a process more than there are cores. TEST_PROCESSES=0 for a debugger.
echo "== tests"
python -m pytest "${marked[@]}" -n "${TEST_PROCESSES:-3}" --dist loadfile --no-loadscope-reorder "$@"
