#!/usr/bin/env bash
# B. PCA-Finetune: the baseline with its table factorized (METHOD=svd), trained on by the schedule of experiments 10-13.
# Arguments: rank, then flags of train.py.
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
source scripts/common.sh
take_rank "$@"
need_factors
train_run "gpt_${method}_finetune_k$k" "gpt-$method-finetune-k$k" --preset "${PRESET}_finetune" \
  "${from_factors[@]}" ${rest[@]+"${rest[@]}"}
