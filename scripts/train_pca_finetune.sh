#!/usr/bin/env bash
# Cuts the baseline's token table to a rank and trains the whole model on. It is model B of the main job.
#
# Usage:    bash scripts/train_pca_finetune.sh [RANK] [FLAGS]
# Example:  METHOD=fisher bash scripts/train_pca_finetune.sh 64
# Minutes:  under 1 on 2 CPU cores with METHOD=svd: half of the steps of the baseline, which takes 1.
#
# It needs the run of scripts/train_baseline_gpt2.sh with the same PRESET and OUT. It makes the factors if they are missing.
# It trains as many steps as experiments 10-13.
#
#   RANK      numbers of each token in the compressed table. Default: 128, and 32 with laptop13
#   FLAGS     go to train.py: python train.py --help
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
source scripts/common.sh
take_rank "$@"
need_factors
train_run "gpt_${method}_finetune_k$k" "gpt-$method-finetune-k$k" --preset "${PRESET}_finetune" \
  "${from_factors[@]}" ${rest[@]+"${rest[@]}"}
