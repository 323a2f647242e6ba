#!/usr/bin/env bash
# Gives every file that a program reads N damaged or hostile versions and prints what came of them. Then it tries N random
# configurations.
#
# Usage:    bash scripts/hostile.sh [N]
# Example:  bash scripts/hostile.sh 200
#           SEED=7 bash scripts/hostile.sh 200
# Minutes:  4.5 on one CPU core with 200, which is 7,800 versions in all. The tests do the same with few.
#
#   N         versions of each file. Default: 200
#   SEED      random seed of other versions than the tests have. Default: not set, those of the tests
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export HOSTILE=${1:-200} PROPERTIES=${1:-200} HOSTILE_COUNTS=$(mktemp)
status=0
if [ -n "${SEED:-}" ]; then export HOSTILE_SEED=$SEED; fi
python -m pytest -n 0 ${SEED:+"--hypothesis-seed=$SEED"} tests/test_hostile.py tests/test_hostile_models.py \
  tests/test_properties.py || status=$?
cat "$HOSTILE_COUNTS"
awk -F '[:, ]+' '{ for (i = 2; i < NF; i++) if ($i ~ /^[0-9]+$/) sum[$(i + 1)] += $i }
  END { for (name in sum) printf "%s %d  ", name, sum[name]; print "" }' "$HOSTILE_COUNTS"
exit $status
