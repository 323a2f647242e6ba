#!/usr/bin/env bash
# Trains a model that starts from the PCA of the baseline's token table; all its other weights start at random. It is model A
# of the main job.
#
# Usage:    bash scripts/train_pca_compressed.sh [RANK] [FLAGS]
# Example:  PRESET=laptop bash scripts/train_pca_compressed.sh 64
# Minutes:  about 1 on 2 CPU cores.
#
# It needs the run of scripts/train_baseline_gpt2.sh with the same PRESET and OUT. It makes the factors if they are missing,
# always by METHOD=svd.
#
#   RANK      numbers of each token in the compressed table. Default: 128, and 32 with laptop13
#   FLAGS     go to train.py: python train.py --help
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
source scripts/common.sh
take_rank "$@"
METHOD=svd
need_factors
train_run "gpt_pca_k$k" "gpt-pca-k$k" --preset "$PRESET" --n_embd_wte "$k" \
  --import_wte_npy "$wte_npy" --import_scale_matrices_npz "$scale_npz" ${rest[@]+"${rest[@]}"}
