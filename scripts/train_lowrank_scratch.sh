#!/usr/bin/env bash
# Trains a model whose token table is two random factors, from scratch, all its weights: experiments 2-5.
#
# Usage:    bash scripts/train_lowrank_scratch.sh [RANK] [FLAGS]
# Example:  PRESET=laptop13 bash scripts/train_lowrank_scratch.sh 32
# Minutes:  about 3 on 2 CPU cores (projected from 100 steps).
#
#   RANK      numbers of each token in the compressed table. Default: 128, and 32 with laptop13
#   FLAGS     go to train.py: python train.py --help
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
LAPTOP=laptop13
source scripts/common.sh
take_rank "$@"
train_run "gpt_lowrank_scratch_k$k" "lowrank-scratch-k$k" --preset "$PRESET" --n_embd_wte "$k" ${rest[@]+"${rest[@]}"}
