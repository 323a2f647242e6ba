#!/usr/bin/env bash
# Trains a model whose token table is two random factors, from scratch. It is model C of the main job.
#
# Usage:    bash scripts/train_random_lowrank.sh [RANK] [FLAGS]
# Example:  PRESET=laptop bash scripts/train_random_lowrank.sh 64
# Minutes:  about 1 on 2 CPU cores.
#
# The product of the factors starts with the standard deviation of a dense table. --factor_init naive draws the factors as the
# original scripts did.
#
#   RANK      numbers of each token in the compressed table. Default: 128, and 32 with laptop13
#   FLAGS     go to train.py: python train.py --help
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
source scripts/common.sh
take_rank "$@"
train_run "gpt_random_lowrank_k$k" "gpt-random-lowrank-k$k" --preset "$PRESET" --n_embd_wte "$k" ${rest[@]+"${rest[@]}"}
