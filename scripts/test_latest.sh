#!/usr/bin/env bash
# Runs the tests with the newest version of every package that pyproject.toml allows: bash scripts/test_latest.sh [--lock]
# Failures are reported, but the exit code is always 0: they are work for later, not a reason to stop a change. With
# --lock, the versions are written to tests/locked/ if all tests pass; this is how the locked versions are updated.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export LLMQ_LOCKED=0 LLMQ_ENVIRONMENT=${LLMQ_ENVIRONMENT:-$root/.venv-latest}
if [ -e "$LLMQ_ENVIRONMENT" ] && [ ! -e "$LLMQ_ENVIRONMENT/pyvenv.cfg" ]; then
    echo "error: $LLMQ_ENVIRONMENT is not a virtual environment; it would be deleted" >&2
    exit 2
fi
rm -rf "$LLMQ_ENVIRONMENT" "$LLMQ_ENVIRONMENT-interop" "$LLMQ_ENVIRONMENT-onnx" "$LLMQ_ENVIRONMENT-triton36"
status=0
bash "$root/scripts/test.sh" || status=$?

versions=$(mktemp -d)
trap 'rm -rf "$versions"' EXIT
# torch is chosen by LLMQ_TORCH, and the CUDA packages are its dependencies.
others='^(torch|nvidia-.*|llmq|setuptools)( |=|@)'
"$LLMQ_ENVIRONMENT/bin/python" -m pip freeze --exclude-editable --all | grep -vE "$others" >"$versions/main.txt"
for name in interop onnx triton36; do
    if [ -x "$LLMQ_ENVIRONMENT-$name/bin/python" ]; then
        "$LLMQ_ENVIRONMENT-$name/bin/python" -m pip freeze --exclude-editable --local --all |
            grep -vE "$others" >"$versions/$name.txt"
    fi
done
echo "== newest versions compared with tests/locked/"
diff --unified=0 "$root/tests/locked" "$versions" && echo "no difference"
if [ "$status" != 0 ]; then
    echo "some tests fail with the newest versions; the locked versions are unchanged"
elif [ "${1:-}" = --lock ]; then
    mkdir -p "$root/tests/locked"
    cp "$versions"/*.txt "$root/tests/locked/"
    echo "wrote the newest versions to tests/locked/"
fi
exit 0
