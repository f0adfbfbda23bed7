#!/usr/bin/env bash
# Checks the files in launch/ with the tools of those who use them; what is not installed is skipped.
#   promtool, kustomize (or kubectl), kubernetes-validate and hadolint (both on PyPI), systemd-analyze
set -uo pipefail
cd "$(dirname "$0")/../launch"
failed=0

check() {
    if ! command -v "$1" > /dev/null; then
        echo "skipped, there is no $1: $*"
    elif "$@"; then
        echo "ok: $*"
    else
        echo "FAILED: $*"
        failed=1
    fi
}

check promtool check rules prometheus/alerts.yaml
check promtool test rules prometheus/alerts_test.yaml
check kustomize build kubernetes --output "$(mktemp)"
check kubernetes-validate --strict kubernetes/{deployment,service,network-policy}.yaml
check hadolint --ignore DL3008 docker/Dockerfile
for script in *.sh *.sbatch; do check bash -n "$script"; done
exit "$failed"
