#!/usr/bin/env bash
# Trains the low-rank model from scratch on, all its weights, for as many steps as experiments 10-13 get: their control.
#
# Usage:    bash scripts/train_lowrank_more.sh [RANK] [FLAGS]
# Example:  PRESET=laptop13 bash scripts/train_lowrank_more.sh 32
# Minutes:  not measured. It trains half as many steps as train_lowrank_scratch.sh, which takes about 3 on 2 CPU cores.
#
# It needs the run of scripts/train_lowrank_scratch.sh with the same RANK, PRESET and OUT.
#
#   RANK      numbers of each token in the compressed table. Default: 128, and 32 with laptop13
#   FLAGS     go to train.py: python train.py --help
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
LAPTOP=laptop13
source scripts/common.sh
take_rank "$@"
start_from "gpt_lowrank_scratch_k$k" train_lowrank_scratch.sh
train_run "gpt_lowrank_scratch_more_k$k" "lowrank-scratch-more-k$k" --preset "${PRESET}_finetune" \
  --init_from prev_run --prev_run_ckpt "$OUT/gpt_lowrank_scratch_k$k" ${rest[@]+"${rest[@]}"}
