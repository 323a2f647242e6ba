#!/usr/bin/env bash
# Sets up, checks the style, runs the tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
python -m ruff check .
python -m ruff format --check .
python -m pytest "$@"
