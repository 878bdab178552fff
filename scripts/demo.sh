#!/usr/bin/env bash
# The main job on the bundled model, from any folder: bash scripts/demo.sh [output folder]
# Makes an environment on the first run; downloads nothing else.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment
exec "$environment/bin/python" "$root/scripts/demo.py" "${1:-$root/demo-output}"
