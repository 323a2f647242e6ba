#!/usr/bin/env bash
# B. PCA-Finetune: the baseline with its table factorized (METHOD=svd), trained on by the schedule of experiments 10-13.
# Arguments: rank, then flags of train.py.
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
source scripts/common.sh
take_rank "$@"
need_factors
train_run "gpt_${method}_finetune_k$k" "gpt-$method-finetune-k$k" --preset "${PRESET}_finetune" --n_embd_wte "$k" \
  --init_from prev_run --prev_run_ckpt "$OUT/gpt_baseline" \
  --import_wte_npy "$wte_npy" --import_scale_matrices_npz "$scale_npz" ${rest[@]+"${rest[@]}"}
