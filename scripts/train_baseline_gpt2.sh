#!/usr/bin/env bash
# D. Baseline: a dense token table, trained from scratch. Further flags go to train.py.
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
source scripts/common.sh
train_run gpt_baseline gpt-baseline --preset "$PRESET" "$@"
