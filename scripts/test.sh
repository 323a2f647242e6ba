#!/usr/bin/env bash
# Sets up, checks the style with ruff and runs the tests.
#
# Usage:    bash scripts/test.sh [--quick or --oldest] [ARGUMENTS]
# Example:  bash scripts/test.sh                  all tests
#           bash scripts/test.sh --quick          without the tests that run whole programs
#           bash scripts/test.sh --oldest         what scripts/test_oldest.sh does
#           bash scripts/test.sh -k rotary        the tests with "rotary" in their name
# Minutes:  4 on 2 CPU cores for all tests.
#
#   ARGUMENTS  go to pytest
set -euo pipefail
SETUP_TESTS=1 && source "$(dirname "$0")/setup.sh"
if [ "${1:-}" = --oldest ]; then shift && exec bash scripts/test_oldest.sh "$@"; fi
quick=()
if [ "${1:-}" = --quick ]; then quick=(-m "not slow") && shift; fi
python -m ruff check .
python -m ruff format --check .
python -m pytest ${quick[@]+"${quick[@]}"} "$@"
