#!/usr/bin/env bash
# Sets up, checks the style, runs the tests. Arguments go to pytest.
#
#   bash scripts/test.sh                  everything
#   bash scripts/test.sh --quick          without the tests that run whole programs
#   bash scripts/test.sh --oldest         the quick tests and a compiled main job on the oldest torch that is promised
#   bash scripts/test.sh -k rotary        the tests with this in their name
set -euo pipefail
SETUP_TESTS=1 && source "$(dirname "$0")/setup.sh"
if [ "${1:-}" = --oldest ]; then shift && exec bash scripts/test_oldest.sh "$@"; fi
quick=()
if [ "${1:-}" = --quick ]; then quick=(-m "not slow") && shift; fi
python -m ruff check .
python -m ruff format --check .
python -m pytest ${quick[@]+"${quick[@]}"} "$@"
