#!/usr/bin/env bash
# What a machine with one GPU and no network makes of this, in some five minutes:
#   tools/gpu_check.sh [--rehearse]
# Each stage has a limit of its own and a log under $OUT (default: gpu-check), and the next one
# follows whatever became of it. The last thing printed is a table, and its last row the card.
# --rehearse runs all of it on the CPU with a tiny model, which says that it runs and nothing else.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT="${OUT:-gpu-check}" PYTHONPATH="$PWD" PYTHONUNBUFFERED=1
python="${PYTHON:-python}"
mkdir -p "$OUT"
rm -f "$OUT/table.jsonl"

rehearsal="${1:-}"
kernels=tests/unit/kernels marked=gpu
if [ "$rehearsal" = --rehearse ]; then
    kernels="$kernels/test_row_kernels.py" marked="not gpu"
else
    export TRITON_INTERPRET=0
fi

stage() {
    local name="$1" limit="$2" status
    shift 2
    echo "== $name (at most $limit s)"
    timeout -k 5 "$limit" "$@" > "$OUT/$name.log" 2>&1
    status=$?
    if [ "$status" -ne 0 ]; then
        tail -n 15 "$OUT/$name.log"
        "$python" tools/gpu_check.py add "$name" "failed with status $status, see $OUT/$name.log"
    elif [[ "$name" = tests-* ]]; then
        "$python" tools/gpu_check.py add "$name" "$(tail -n 1 "$OUT/$name.log")" > /dev/null
    fi
}
tests() {
    stage "tests-$1" 120 "$python" -m pytest -q --timeout 60 -p no:cacheprovider -W default "${@:2}"
}
check() {
    stage "$1" "$2" "$python" -W default tools/gpu_check.py "$1" $rehearsal
}

check machine 60
tests kernels "$kernels"
tests device -m "$marked" tests/unit/worker/test_host_pool.py tests/unit/worker/test_megatron_runner.py \
    ${rehearsal:+-k "no_pool or empty_batch"}
check accuracy 60
check weights 90
for engine in torch kernels graphs fp8; do
    check "decode-$engine" 60
done
check swap 60
check trace 60
"$python" tools/gpu_check.py table $rehearsal
