#!/usr/bin/env bash
# Factorizes the baseline's token table and writes the factors to OUT/pca_factorized.
#
# Usage:    bash scripts/run_pca_factorization.sh [RANKS] [FLAGS]
# Example:  bash scripts/run_pca_factorization.sh 128,0.9 --method freq
# Minutes:  3 seconds on 2 CPU cores for one rank by svd. whiten, joint and fisher read text first, which is not measured.
#
# It needs the run of scripts/train_baseline_gpt2.sh with the same PRESET and OUT.
#
#   RANKS     separated by commas. A number below 1 is a share of the table's energy. Default: 16,32,64,128 with laptop and
#             laptop_adamw, 8,16,32,64 with laptop13, otherwise 64,128,256,512
#   FLAGS     go to pca_factorize_wte.py, --method among them: METHOD is not read here
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
source scripts/common.sh
start_from gpt_baseline train_baseline_gpt2.sh
case ${1:-} in
  "" | --*) case $PRESET in laptop | laptop_adamw) ranks=16,32,64,128 ;; laptop13) ranks=8,16,32,64 ;; *) ranks=64,128,256,512 ;; esac ;;
  *) ranks=$1; shift ;;
esac
folder=$OUT/pca_factorized
python util_factorization/pca_factorize_wte.py --ckpt_path "$OUT/gpt_baseline/ckpt.pt" --rank_k "$ranks" \
  --out_wte_npy "$folder/wte_{method}_k{k}.npy" --out_scale_npz "$folder/scale_mats_{method}_k{k}.npz" "$@"
