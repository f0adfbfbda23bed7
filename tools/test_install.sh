#!/usr/bin/env bash
# Builds the wheel, installs it in a fresh environment for each promised Python at hand, and uses it
# there as a new user would (tools/use_installed.py).
#   tools/test_install.sh [3.11 3.12 3.13]     default: those that setup.cfg promises
# Needs 2 GB of disk for one Python at a time, in TMPDIR. TORCH_INDEX as in tools/setup_venv.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
source_directory="$PWD"
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
export PIP_DISABLE_PIP_VERSION_CHECK=1

versions=("$@")
[ "${#versions[@]}" -gt 0 ] || versions=(3.11 3.12 3.13)

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

# Prints a Python of this version: from PATH, where a shim of pyenv may stand for none, or of pyenv.
find_python() {
    local candidate
    for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        if [ "$("$candidate" -c 'import sys, venv; print("%d.%d" % sys.version_info[:2])' \
            2> /dev/null)" = "$1" ]; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# Without the directories that earlier builds have left: a wheel takes what lies in build/.
build_wheel() {
    mkdir "$work/source"
    cp -r fastserve_mega setup.cfg setup.py MANIFEST.in pyproject.toml README.md LICENSE "$work/source"
    "$1" -m venv "$work/builder"
    "$work/builder/bin/python" -m pip --quiet wheel --no-deps --wheel-dir "$work" "$work/source"
    rm -rf "$work/builder" "$work/source"
    echo "$work"/fastserve_mega-*.whl
}

# In an empty directory, so that nothing of the source tree is imported.
use() {
    local environment="$work/environment" torch
    "$1" -m venv "$environment"
    torch="$(grep '^torch==' constraints.txt)"
    "$environment/bin/python" -m pip --quiet install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
        "$torch" || return
    "$environment/bin/python" -m pip --quiet install "$wheel[all,mpi,demo]" || return
    "$environment/bin/python" -m pip check || return
    "$environment/bin/python" tools/fetch_smollm2.py || return
    use_client "$1" || return
    mkdir -p "$work/empty"
    (cd "$work/empty" && "$environment/bin/python" "$source_directory/tools/use_installed.py")
}

# The role of a program that only asks: small, and without torch.
use_client() {
    local environment="$work/client" before megabytes
    "$1" -m venv "$environment"
    before="$(du -sk "$environment" | cut -f1)"
    "$environment/bin/python" -m pip --quiet install "$wheel[client]" || return
    megabytes="$((($(du -sk "$environment" | cut -f1) - before) / 1000))"
    echo "-- the client's installation takes $megabytes MB"
    [ "$megabytes" -lt 60 ] || return
    (cd / && "$environment/bin/python" - << 'PROGRAM') || return
import sys

from fastserve_mega import Client, SamplingParams
from fastserve_mega.client.testing import FakeCoordinator

with FakeCoordinator("Hello there") as server, Client(server.endpoint) as client:
    answer = client.chat([{"role": "user", "content": "Hi"}], SamplingParams(max_tokens=64))
    for _ in answer:
        pass
    assert answer.text == "Hello there", answer.text
assert not {"torch", "numpy", "transformers"} & set(sys.modules)
PROGRAM
    rm -rf "$environment"
}

wheel="" used=() missing=() failed=()
for version in "${versions[@]}"; do
    if ! python="$(find_python "$version")"; then
        echo "== Python $version: skipped, it is neither in PATH nor in ~/.pyenv"
        missing+=("$version")
        continue
    fi
    echo "== Python $version: $python"
    [ -n "$wheel" ] || wheel="$(build_wheel "$python")"
    if use "$python"; then used+=("$version"); else failed+=("$version"); fi
    rm -rf "$work/environment"
done
echo "works with: ${used[*]:-none}; fails with: ${failed[*]:-none}; skipped: ${missing[*]:-none}"
[ "${#failed[@]}" -eq 0 ] && [ "${#used[@]}" -gt 0 ]
