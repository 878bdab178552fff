#!/usr/bin/env bash
# The demo on the bundled model, from any folder: bash scripts/demo.sh [output folder]
# The first run makes an environment; nothing else is downloaded.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment
exec "$environment/bin/python" "$root/scripts/demo.py" "${1:-$root/demo-output}"
