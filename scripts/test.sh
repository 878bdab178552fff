#!/usr/bin/env bash
# The tests, all of them, from any folder: bash scripts/test.sh [arguments for pytest]
# Makes what it needs on the first run: an environment for llmq, and two more that see the first one's packages behind
# their own: one for the packages of other tools, which are held against what llmq writes, and one for the oldest Triton
# that the kernels are for.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment
cd "$root"
install test --group test --group lint
python=$environment/bin/python

# make_beside NAME: makes $environment-NAME, whose own packages, those of the dependency group NAME, come before the
# first environment's.
make_beside() {
    local beside=$environment-$1 packages own
    if [ ! -x "$beside/bin/python" ]; then
        "$python" -m venv "$beside"
        packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        own=$("$beside/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        echo "import site; site.addsitedir('$packages')" >"$own/llmq-environment.pth"
    fi
    (environment=$beside && install pip --upgrade "pip>=25.1" && install "$1" --group "$1")
}

make_beside interop
# Triton's wheels are for Linux on x86-64; elsewhere there is nothing to test.
triton36=
if "$python" -c 'import triton' 2>/dev/null; then
    make_beside triton36
    triton36=$environment-triton36
fi

if [ $# -gt 0 ]; then
    exec "$python" -m pytest "$@"
fi

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
# On a second core, beside the others, about half of the work: the kernels' tests, with the oldest Triton too (its
# interpreter makes numbers of arrays in a way that NumPy has deprecated), other tools' packages, and the architectures.
architectures=tests/e2e/test_architectures.py
second_half() {
    if [ -n "$triton36" ]; then
        local deprecated="ignore:Conversion of an array with ndim > 0:DeprecationWarning"
        echo "the kernels' tests with Triton 3.6.0:"
        "$triton36/bin/python" -m pytest -m "not gpu" -W "$deprecated" tests/kernels || return
    else
        echo "not run: the kernels' tests with Triton 3.6.0, because there is no Triton for this machine" >&2
    fi
    echo "the tests with other tools' packages:"
    "$environment-interop/bin/python" -m pytest -p no:cacheprovider -m interop tests/interop || return
    echo "the kernels' tests, and the architectures:"
    "$python" -m pytest -p no:cacheprovider tests/kernels "$architectures"
}
output=$(mktemp)
second_half >"$output" 2>&1 &
beside=$!
trap 'kill "$beside" 2>/dev/null || true; rm -f "$output"' EXIT
status=0
"$python" -m pytest -m "not interop" --ignore=tests/kernels --ignore="$architectures" || status=$?
if wait "$beside"; then
    grep -E "^(the |not run)|(passed|failed).* in " "$output"
else
    status=$?
    cat "$output"
fi
exit "$status"
