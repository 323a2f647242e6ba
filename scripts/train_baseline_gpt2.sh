#!/usr/bin/env bash
# D. Baseline: a dense token table, trained from scratch. Further flags go to train.py.
source "$(dirname "$0")/setup.sh"
source "$(dirname "$0")/common.sh"
train_run gpt_baseline gpt-baseline --preset "$PRESET" "$@"
