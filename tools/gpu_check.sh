#!/usr/bin/env bash
# What a machine with one GPU and no network makes of this, in at most ten minutes:
#   tools/gpu_check.sh [--rehearse] [STAGE …]
# Each stage has a limit of its own and a log under $OUT (default: gpu-check), and the next one
# follows whatever became of it; none begins when less than 15 of $BUDGET_S seconds are left. What is
# asked for most comes first. The last thing printed is a table: what was asked, what was got, and
# in its last row the card. --rehearse runs all of it on the CPU with a tiny model, which says that
# it runs and nothing else.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT="${OUT:-gpu-check}" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python="${PYTHON:-python}"
mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"
rm -f "$OUT/table.jsonl"
budget_s="${BUDGET_S:-580}"

rehearsal=""
kernels=(tests/unit/kernels --ignore tests/unit/kernels/test_compiled_kernels.py)
device=(-m gpu) card=""
if [ "${1:-}" = --rehearse ]; then
    shift
    rehearsal=--rehearse
    kernels=(tests/unit/kernels/test_row_kernels.py)
    device=(-m "not gpu" -k "no_pool or empty_batch") card="none: a rehearsal on the CPU"
else
    export TRITON_INTERPRET=0
    card="$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>&1 | head -n 1)"
fi

stage() {
    local name="$1" limit="$2" left status
    shift 2
    left=$((budget_s - SECONDS))
    if [ "$left" -lt 15 ]; then
        "$python" tools/gpu_table.py add "stage $name" "not begun, $left s were left"
        return
    fi
    limit=$((limit < left ? limit : left))
    echo "== $name (at most $limit s, at $SECONDS s)"
    timeout -k 5 "$limit" "$@" > "$OUT/$name.log" 2>&1
    status=$?
    grep -h ' asked [<>]= ' "$OUT/$name.log"
    if [ "$status" -ne 0 ]; then
        tail -n 15 "$OUT/$name.log"
        "$python" tools/gpu_table.py add "stage $name" "failed with status $status, see $name.log"
    elif [[ "$name" = tests-* ]]; then
        "$python" tools/gpu_table.py add "$name" "$(tail -n 1 "$OUT/$name.log")"
    fi
}

run() {
    local name="$1"
    case "$name" in
        tests-kernels) stage "$name" 200 "$python" -m pytest -q --timeout 100 -p no:cacheprovider \
            -W default "${kernels[@]}" ;;
        tests-device) stage "$name" 150 "$python" -m pytest -q --timeout 100 -p no:cacheprovider \
            -W default "${device[@]}" tests/unit/worker/test_host_pool.py \
            tests/unit/worker/test_megatron_runner.py ;;
        http | load) stage "$name" 150 "$python" -W default tools/gpu_check.py "$name" $rehearsal ;;
        *) stage "$name" 90 "$python" -W default tools/gpu_check.py "$name" $rehearsal ;;
    esac
}

if [ $# -eq 0 ]; then
    set -- machine decode-graphs tokens prefill swap tests-device accuracy decode-ahead load http \
        tests-kernels decode-fp8 decode-kernels decode-torch trace
fi
for name in "$@"; do
    run "$name"
done
rm -rf /dev/shm/gpu-check-* "$OUT"/gpu-check-*
"$python" tools/gpu_table.py table "$card"
