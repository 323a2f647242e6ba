#!/usr/bin/env bash
# Trains the uncompressed baseline on for the extra steps that the fine-tuned model (B) gets: its control, D+ of the main job.
#
# Usage:    bash scripts/train_baseline_more.sh [FLAGS]
# Example:  PRESET=laptop bash scripts/train_baseline_more.sh
# Minutes:  under 1 on 2 CPU cores: half of the steps of the baseline, which takes 1.
#
# It needs the run of scripts/train_baseline_gpt2.sh with the same PRESET and OUT.
#
#   FLAGS     go to train.py: python train.py --help
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
source scripts/common.sh
start_from gpt_baseline train_baseline_gpt2.sh
train_run gpt_baseline_more gpt-baseline-more --preset "${PRESET}_finetune" \
  --init_from prev_run --prev_run_ckpt "$OUT/gpt_baseline" "$@"
