#!/usr/bin/env bash
# The baseline's token table -> factor files. Arguments: ranks (left out: the seeds' four), then flags of pca_factorize_wte.py.
#   bash scripts/run_pca_factorization.sh
#   bash scripts/run_pca_factorization.sh 128,0.9 --method freq
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
