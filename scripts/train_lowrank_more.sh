#!/usr/bin/env bash
# The control of 10-13: the low-rank model from scratch, trained on for as many steps as they are, every weight.
# Arguments: rank, then flags of train.py.
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
LAPTOP=laptop13
source scripts/common.sh
take_rank "$@"
start_from "gpt_lowrank_scratch_k$k" train_lowrank_scratch.sh
train_run "gpt_lowrank_scratch_more_k$k" "lowrank-scratch-more-k$k" --preset "${PRESET}_finetune" \
  --init_from prev_run --prev_run_ckpt "$OUT/gpt_lowrank_scratch_k$k" ${rest[@]+"${rest[@]}"}
