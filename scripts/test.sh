#!/usr/bin/env bash
# Sets up, checks the style, runs the tests. Arguments go to pytest.
#
#   bash scripts/test.sh                  everything
#   bash scripts/test.sh --quick          without the tests that run whole programs
#   bash scripts/test.sh -k rotary        the tests with this in their name
set -euo pipefail
source "$(dirname "$0")/setup.sh"
quick=()
if [ "${1:-}" = --quick ]; then quick=(-m "not slow") && shift; fi
python -m ruff check .
python -m ruff format --check .
python -m pytest ${quick[@]+"${quick[@]}"} "$@"
