# Sourced by demo.sh and test.sh: makes a virtual environment with llmq, if there is none yet.
#
#   PYTHON            the interpreter; by default the first of python3, python3.13, 3.12, 3.11 that is 3.11–3.13
#   LLMQ_TORCH        the torch requirement; by default torch==2.13.0 without a GPU (some indexes offer a CPU build),
#                     torch>=2.8 with a GPU
#   LLMQ_ENVIRONMENT  the folder of the environment; by default .venv in the checkout
#   LLMQ_LOCKED       0 installs the newest version of every package instead of the versions in tests/locked/

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
environment=${LLMQ_ENVIRONMENT:-$root/.venv}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 to 3.13 was found (looked for ${PYTHON:-python3, python3.13, python3.12, python3.11})" >&2
    echo "try:   install one, or give its path: PYTHON=/path/to/python3.12 bash $0" >&2
    exit 1
}

has_gpu() {
    command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1
}

# locked NAME: prints the versions in tests/locked/NAME.txt. Another torch than the default needs another version of
# Triton, so Triton is not locked then.
locked() {
    local file=$root/tests/locked/$1.txt
    if [ "${LLMQ_LOCKED:-1}" = 0 ] || [ ! -f "$file" ]; then
        return
    elif [ -n "${LLMQ_TORCH:-}" ] || has_gpu; then
        grep -v "^triton==" "$file"
    else
        cat "$file"
    fi
}

# install NAME LOCK ARGUMENTS…: pip install with the versions in tests/locked/LOCK.txt, if pyproject.toml, the lock or
# the arguments have changed since the last time.
install() {
    local stamp=$environment/.installed-$1 wanted=$environment/.wanted versions=$environment/.locked-$1.txt
    locked "$2" >"$versions"
    shift 2
    { cat "$root/pyproject.toml" "$versions" && printf '%s\n' "$@"; } >"$wanted"
    if [ -f "$stamp" ] && cmp -s "$stamp" "$wanted"; then
        return
    fi
    # setuptools warns of every editable installation; newer versions of pip print this even with --quiet.
    PYTHONWARNINGS=ignore::UserWarning "$environment/bin/python" -m pip install --quiet --constraint "$versions" "$@"
    mv "$wanted" "$stamp"
}

# make_separate NAME: makes the test environment of the checkout, and $environment-NAME for packages that are not for it;
# goes to the checkout.
make_separate() {
    make_environment
    cd "$root"
    install test main --group test
    if [ ! -x "$environment-$1/bin/python" ]; then
        "$environment/bin/python" -m venv "$environment-$1"
    fi
}

make_environment() {
    if [ ! -x "$environment/bin/python" ]; then
        local python
        python=$(find_python)
        echo "making the environment $environment with $("$python" --version); this takes minutes, but only once" >&2
        "$python" -m venv "$environment"
    fi
    local torch="torch==2.13.0"
    if has_gpu; then
        torch="torch>=2.8"
    fi
    install pip main --upgrade "pip>=25.1"
    install torch main "${LLMQ_TORCH:-$torch}"
    install llmq main --editable "$root"
}
