#!/usr/bin/env bash
# Opens reports in Chromium: bash scripts/check_report.sh [FOLDER FOR REPORTS AND SCREENSHOTS]
# Makes the environment of scripts/test.sh if there is none, and .venv-report with Playwright and axe-core (60 MB).
# Chromium is that of the system (Debian: apt-get install chromium); without one, nothing is checked.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_separate report
report=$environment-report
(environment=$report && install report report "playwright==1.65.2" "axe-playwright-python==0.1.8")
folder=${1:-$(mktemp -d)}
"$environment/bin/python" scripts/example_reports.py "$folder"
"$report/bin/python" scripts/check_report.py "$folder"/*/report.html --pictures "$folder/pictures"
