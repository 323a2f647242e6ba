#!/usr/bin/env bash
# B. PCA-Finetune: the baseline with its table factorized, trained on by the schedule of experiments 10-13.
# Arguments: rank, then flags of train.py.
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
source scripts/common.sh
take_rank "$@"
train_run "gpt_pca_finetune_k$k" "gpt-pca-finetune-k$k" --preset "${PRESET}_finetune" --n_embd_wte "$k" \
  --init_from prev_run --prev_run_ckpt "$OUT/gpt_baseline" \
  --import_wte_npy "$OUT/pca_factorized/wte_pca_k$k.npy" \
  --import_scale_matrices_npz "$OUT/pca_factorized/scale_mats_pca_k$k.npz" ${rest[@]+"${rest[@]}"}
