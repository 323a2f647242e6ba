#!/usr/bin/env bash
# The control of B: the baseline, uncompressed, with the same extra steps. Further flags go to train.py.
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
source scripts/common.sh
start_from gpt_baseline train_baseline_gpt2.sh
train_run gpt_baseline_more gpt-baseline-more --preset "${PRESET}_finetune" \
  --init_from prev_run --prev_run_ckpt "$OUT/gpt_baseline" "$@"
