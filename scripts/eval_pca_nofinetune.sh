#!/usr/bin/env bash
# Cuts the baseline's token table to a rank and evaluates the model without training it: experiments 6-9.
#
# Usage:    bash scripts/eval_pca_nofinetune.sh [RANK] [FLAGS]
# Example:  METHOD=fisher bash scripts/eval_pca_nofinetune.sh 16
# Minutes:  under 1 on 2 CPU cores if the factors are there (projected from the time of all 13 experiments).
#
# It needs the run of scripts/train_baseline_gpt2.sh with the same PRESET and OUT. It makes the factors if they are missing.
#
#   RANK      numbers of each token in the compressed table. Default: 128, and 32 with laptop13
#   FLAGS     go to train.py: python train.py --help
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
LAPTOP=laptop13
source scripts/common.sh
take_rank "$@"
need_factors
train_run "gpt_${method}_nofinetune_k$k" "$method-nofinetune-k$k" --preset "${PRESET}_finetune" --eval_only \
  "${from_factors[@]}" ${rest[@]+"${rest[@]}"}
