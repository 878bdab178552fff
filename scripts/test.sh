#!/usr/bin/env bash
# Runs all tests, from any folder: bash scripts/test.sh [arguments for pytest]
# The first run makes four environments: one for llmq, and three that add packages to it: two with the packages of other
# tools, which are compared with the output of llmq, and one with the oldest supported Triton.
# Versions are locked in tests/locked/; `bash scripts/test_latest.sh` tests the newest versions.
# All parts run even if earlier parts fail; the last lines are a summary of all parts.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment
cd "$root"
install test main --group test --group lint --group docs
python=$environment/bin/python

# make_overlay NAME: makes $environment-NAME, where the packages of the dependency group NAME take precedence over those
# of the first environment.
make_overlay() {
    local overlay=$environment-$1 packages own
    if [ ! -x "$overlay/bin/python" ]; then
        "$python" -m venv "$overlay"
        packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        own=$("$overlay/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        echo "import site; site.addsitedir('$packages')" >"$own/llmq-environment.pth"
    fi
    (environment=$overlay && install pip main --upgrade "pip>=25.1" && install "$1" "$1" --group "$1")
}

make_overlay interop
make_overlay onnx
# Triton has wheels for Linux on x86-64 only; elsewhere there is nothing to test.
triton36=
if "$python" -c 'import triton' 2>/dev/null; then
    make_overlay triton36
    triton36=$environment-triton36
fi

if [ $# -gt 0 ]; then
    exec "$python" -m pytest "$@"
fi

results=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$results"' EXIT

# part NUMBER NAME COMMAND…: runs a part of the tests and records its exit code and its last line.
part() {
    local number=$1 name=$2 status=0
    shift 2
    echo "== $name"
    "$@" 2>&1 | tee "$results/$number.log" || status=${PIPESTATUS[0]}
    if [ "$status" = 0 ]; then
        printf 'passed  %s: %s\n' "$name" "$(tail -n 1 "$results/$number.log" | tr -d '=')" >"$results/$number.result"
    else
        printf 'FAILED  %s: %s\n' "$name" "$(tail -n 1 "$results/$number.log" | tr -d '=')" >"$results/$number.result"
    fi
}

# About half of the work, for a second core. The interpreter of Triton 3.6 converts arrays to numbers in a way that NumPy
# has deprecated.
second=(
    tests/kernels tests/fuzz tests/faults tests/e2e/test_architectures.py tests/e2e/test_odd_runs.py
    tests/e2e/test_train.py tests/e2e/test_training_in_python.py tests/e2e/test_merge.py
)
second_half() {
    if [ -n "$triton36" ]; then
        local deprecated="ignore:Conversion of an array with ndim > 0:DeprecationWarning"
        part 5 "kernels with Triton 3.6.0" \
            "$triton36/bin/python" -m pytest -m "not gpu" -W "$deprecated" tests/kernels
    else
        echo "not run  kernels with Triton 3.6.0: Triton is not available for this machine" >"$results/5.result"
    fi
    part 6 "packages of other tools" "$environment-interop/bin/python" -m pytest -p no:cacheprovider -m interop tests/interop
    part 9 "ONNX" "$environment-onnx/bin/python" -m pytest -p no:cacheprovider -m interop tests/interop/test_onnx.py
    part 7 "kernels, architectures, faults, training" "$python" -m pytest -p no:cacheprovider "${second[@]}"
}
second_half >"$results/second_half.log" 2>&1 &
running=$!
part 1 "ruff check" "$python" -m ruff check .
part 2 "ruff format" "$python" -m ruff format --check .
part 3 "mypy" "$python" -m mypy
part 8 "documentation site" "$python" "$root/scripts/site.py" "$results/site"
part 4 "everything else" "$python" -m pytest -m "not interop" "${second[@]/#/--ignore=}"
wait "$running" || true
if grep -q "^FAILED" "$results"/[5679].result || [ "$(cat "$results"/[5679].result | wc -l)" -lt 4 ]; then
    cat "$results/second_half.log"
fi
echo "== all parts"
cat "$results"/*.result
if [ "$(cat "$results"/*.result | wc -l)" -lt 9 ] || grep -q "^FAILED" "$results"/*.result; then
    exit 1
fi
