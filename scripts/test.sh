#!/usr/bin/env bash
# The tests, all of them, from any folder: bash scripts/test.sh [arguments for pytest]
# Makes what it needs on the first run: an environment for llmq, and one more for the packages of other tools, which
# see the first one's torch and are held against what llmq writes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment
cd "$root"
install test --group test --group lint
python=$environment/bin/python

interop=$environment-interop
if [ ! -x "$interop/bin/python" ]; then
    "$python" -m venv "$interop"
    packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    own=$("$interop/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "import site; site.addsitedir('$packages')" >"$own/llmq-environment.pth"
fi
(environment=$interop && install pip --upgrade "pip>=25.1" && install interop --group interop)

if [ $# -eq 0 ]; then
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    "$python" -m mypy
    "$python" -m pytest -m "not interop"
    "$interop/bin/python" -m pytest -m interop tests/interop
else
    "$python" -m pytest "$@"
fi
