#!/usr/bin/env bash
# N small programs, each stopped two or three times at random moments and started again; says how many end bit for bit as the
# uninterrupted one. SEED= draws other moments.
#
#   bash scripts/soak.sh 20               runs of train.py, by SIGKILL; 10 seconds each
#   bash scripts/soak.sh 10 pipelines     the main job, experiments 1-13, V-DProj and surgery in turn, by SIGKILL, SIGTERM and
#                                         Ctrl-C
set -euo pipefail
source "$(dirname "$0")/setup.sh"
PYTHONPATH=. python tests/soak.py "${2:-runs}" "${1:-20}" "${SEED:-0}"
