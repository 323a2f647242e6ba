#!/usr/bin/env bash
# Experiments 2-5. Random factors, full training (the C of the main job). Arguments: rank, then flags of train.py.
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
LAPTOP=laptop13
source scripts/common.sh
take_rank "$@"
train_run "gpt_lowrank_scratch_k$k" "lowrank-scratch-k$k" --preset "$PRESET" --n_embd_wte "$k" ${rest[@]+"${rest[@]}"}
