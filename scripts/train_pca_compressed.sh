#!/usr/bin/env bash
# A. PCA-Scratch: factors of the baseline's table, everything else random, full training. Arguments: rank, then flags of train.py.
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
source scripts/common.sh
take_rank "$@"
METHOD=svd
need_factors
train_run "gpt_pca_k$k" "gpt-pca-k$k" --preset "$PRESET" --n_embd_wte "$k" \
  --import_wte_npy "$wte_npy" --import_scale_matrices_npz "$scale_npz" ${rest[@]+"${rest[@]}"}
