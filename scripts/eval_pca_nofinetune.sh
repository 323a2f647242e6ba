#!/usr/bin/env bash
# Experiments 6-9. The baseline with its table factorized (METHOD=svd), evaluated as it is. Arguments: rank, then flags of train.py.
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
LAPTOP=laptop13
source scripts/common.sh
take_rank "$@"
need_factors
train_run "gpt_${method}_nofinetune_k$k" "$method-nofinetune-k$k" --preset "${PRESET}_finetune" --eval_only \
  "${from_factors[@]}" ${rest[@]+"${rest[@]}"}
