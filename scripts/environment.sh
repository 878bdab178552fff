# Sourced by demo.sh and test.sh: makes, once, a virtual environment that holds llmq, and says what it does.
#
#   PYTHON            the interpreter to use; by default the first of python3, python3.13, 3.12, 3.11 that is 3.11–3.13
#   LLMQ_TORCH        what to ask the package index for; by default torch==2.13.0 without a GPU (some indexes offer a
#                     CPU build of it), torch>=2.8 with one
#   LLMQ_ENVIRONMENT  where the environment goes; by default .venv in the checkout

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
    echo "try:   install one, or name it: PYTHON=/path/to/python3.12 bash $0" >&2
    exit 1
}

# install NAME ARGUMENTS…: pip install, unless the environment already has what pyproject.toml asked for last time.
install() {
    local stamp=$environment/.installed-$1
    shift
    if [ -f "$stamp" ] && cmp -s "$stamp" "$root/pyproject.toml"; then
        return
    fi
    "$environment/bin/python" -m pip install --quiet "$@"
    cp "$root/pyproject.toml" "$stamp"
}

make_environment() {
    if [ ! -x "$environment/bin/python" ]; then
        local python
        python=$(find_python)
        echo "making the environment $environment with $("$python" --version); this takes minutes, once" >&2
        "$python" -m venv "$environment"
    fi
    local torch="torch==2.13.0"
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
        torch="torch>=2.8"
    fi
    install pip --upgrade "pip>=25.1"
    install torch "${LLMQ_TORCH:-$torch}"
    install llmq --editable "$root"
}
