#!/usr/bin/env bash
# Trains the baseline: a GPT with a dense token table, from scratch. It is experiment 1, and model D of the main job.
#
# Usage:    bash scripts/train_baseline_gpt2.sh [FLAGS]
# Example:  PRESET=laptop bash scripts/train_baseline_gpt2.sh --seed 2
# Minutes:  1 on 2 CPU cores; about 3 with PRESET=laptop13 (projected from 100 steps).
#
#   FLAGS     go to train.py: python train.py --help
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
source scripts/common.sh
train_run gpt_baseline gpt-baseline --preset "$PRESET" "$@"
