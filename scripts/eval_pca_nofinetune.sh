#!/usr/bin/env bash
# Experiments 6-9. The baseline with its table factorized (METHOD=svd), evaluated as it is. Arguments: rank, then flags of train.py.
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
LAPTOP=laptop13
source scripts/common.sh
take_rank "$@"
need_factors
train_run "gpt_${method}_nofinetune_k$k" "$method-nofinetune-k$k" --preset "${PRESET}_finetune" --eval_only --n_embd_wte "$k" \
  --init_from prev_run --prev_run_ckpt "$OUT/gpt_baseline" \
  --import_wte_npy "$wte_npy" --import_scale_matrices_npz "$scale_npz" ${rest[@]+"${rest[@]}"}
