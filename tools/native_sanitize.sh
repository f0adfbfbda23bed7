#!/usr/bin/env bash
# The native step under the address, undefined-behaviour and thread sanitizers.
set -euo pipefail
cd "$(dirname "$0")/.."
native=fastserve_mega/worker/native
for sanitizers in address,undefined thread; do
    echo "== $sanitizers"
    mkdir -p "build/$sanitizers"
    "${CXX:-g++}" -std=gnu++17 -O1 -g -Wall -Wextra -Wno-psabi -fno-strict-aliasing \
        -ffp-contract=off -pthread "-fsanitize=$sanitizers" -fno-sanitize-recover=all \
        "-I$native" "$native"/*.cpp tests/native/steps.cpp -o "build/$sanitizers/steps"
    "build/$sanitizers/steps"
done
