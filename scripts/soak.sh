#!/usr/bin/env bash
# Stops small programs two or three times at random moments and starts them again. Says how many end bit for bit as the
# uninterrupted program does.
#
# Usage:    bash scripts/soak.sh [N] [runs or pipelines]
# Example:  bash scripts/soak.sh 20               20 runs of train.py, stopped by SIGKILL
#           bash scripts/soak.sh 10 pipelines     10 pipelines, stopped by SIGKILL, SIGTERM or Ctrl-C: by turns the main job,
#                                                 experiments 1-13, compressed values and surgery
# Minutes:  10 seconds for each run; the pipelines are not measured and take longer.
#
#   N         how many programs. Default: 20
#   SEED      random seed of the moments. Default: 0
set -euo pipefail
source "$(dirname "$0")/setup.sh"
PYTHONPATH=. python tests/soak.py "${2:-runs}" "${1:-20}" "${SEED:-0}"
