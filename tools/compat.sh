#!/usr/bin/env bash
# Real clients against the server, with scripted answers: each group of packages in an environment of
# its own, whose own packages come before those of .venv. A group that cannot be had is skipped.
#   tools/compat.sh [clients agents litellm lm-eval]     default: all
# The environments stay in ${COMPAT_ENVIRONMENTS:-~/.cache/fastserve_mega/compat}; some 400 MB.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${PYTHON:-}" ] || { tools/setup_venv.sh; PYTHON="$PWD/.venv/bin/python"; }
environments="${COMPAT_ENVIRONMENTS:-${FASTSERVE_MEGA_CACHE:-$HOME/.cache/fastserve_mega}/compat}"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONPATH="$PWD"

# mcp: LiteLLM imports it as soon as a request has tools, and does not name it.
declare -A packages=(
    [clients]="openai anthropic langchain-openai"
    [agents]="openai-agents pydantic-ai-slim[openai] instructor"
    [litellm]="litellm mcp"
    [lm-eval]="lm-eval[api]"
)
# Of the group `clients` the tests of the suite as well, with the newest openai.
declare -A tests=(
    [clients]="tests/compat/test_anthropic.py tests/compat/test_langchain.py
        tests/unit/test_responses.py tests/unit/test_tools_over_http.py"
    [agents]="tests/compat/test_agents.py"
    [litellm]="tests/compat/test_litellm.py"
    [lm-eval]="tests/compat/test_lm_eval.py"
)
groups=("$@")
[ "${#groups[@]}" -gt 0 ] || groups=(clients agents litellm lm-eval)

failed=()
for group in "${groups[@]}"; do
    environment="$environments/$group"
    if [ ! -e "$environment/complete" ]; then
        rm -rf "$environment"
        "$PYTHON" -m venv "$environment"
        # shellcheck disable=SC2086 # several packages
        if ! "$environment/bin/pip" install --quiet ${packages[$group]}; then
            echo "$group skipped: ${packages[$group]} cannot be installed"
            continue
        fi
        touch "$environment/complete"
    fi
    # Each time: another clone may have made it, which is gone.
    "$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
        > "$("$environment/bin/python" -c \
            'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_project.pth"
    echo "$group: $("$environment/bin/pip" list --format=freeze 2> /dev/null |
        grep -iE '^(openai|anthropic|langchain-openai|openai-agents|pydantic-ai-slim|instructor|litellm|lm_eval)==' | tr '\n' ' ')"
    # What foreign packages leave to the garbage collector is theirs.
    # shellcheck disable=SC2086 # several files
    "$environment/bin/python" -m pytest -q -p no:cacheprovider \
        -W ignore::pytest.PytestUnraisableExceptionWarning ${tests[$group]} || failed+=("$group")
done
[ "${#failed[@]}" -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
