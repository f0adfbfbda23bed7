#!/usr/bin/env bash
# The native step under clang-tidy, where it is (pip install clang-tidy), and under the address,
# undefined-behaviour and thread sanitizers.
set -euo pipefail
cd "$(dirname "$0")/.."
native=fastserve_mega/worker/native
if command -v clang-tidy > /dev/null; then
    echo "== clang-tidy"
    clang-tidy --quiet "$native"/*.cpp -- -std=gnu++17 "-I$native"
else
    echo "== no clang-tidy"
fi
for sanitizers in address,undefined thread; do
    echo "== $sanitizers"
    mkdir -p "build/$sanitizers"
    "${CXX:-g++}" -std=gnu++17 -O1 -g -Wall -Wextra -Wno-psabi -fno-strict-aliasing \
        -ffp-contract=off -pthread "-fsanitize=$sanitizers" -fno-sanitize-recover=all \
        "-I$native" "$native"/*.cpp tests/native/steps.cpp -o "build/$sanitizers/steps"
    "build/$sanitizers/steps"
done
