#!/usr/bin/env bash
# Gives the baseline's factors to ReaLLMASIC/nanoGPT, checks that its own import gives the same logits as ours, and prints the
# command that trains there from the factors.
#
# Usage:    bash scripts/reallmasic.sh CHECKOUT [RANK] [FLAGS]
# Example:  bash scripts/reallmasic.sh path/to/checkout 128
# Minutes:  not measured. It trains nothing; it makes the factors if they are missing.
#
# It needs the run of scripts/train_baseline_gpt2.sh with the same PRESET and OUT.
#
#   CHECKOUT  folder of: git clone https://github.com/ReaLLMASIC/nanoGPT. Its model.py needs: pip install rich
#   RANK      numbers of each token in the compressed table. Default: 128, and 32 with laptop13
#   FLAGS     go to python -m export.reallmasic
set -euo pipefail
checkout=$(realpath -m -- "${1:-.}")
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
source scripts/common.sh
[ -n "${1:-}" ] || mistake "the first argument is the folder of a checkout: give it"
take_rank "${@:2}"
need_factors
python -m export.reallmasic --checkout "$checkout" --model "$OUT/gpt_baseline" --import_wte_npy "$wte_npy" \
  --import_scale_matrices_npz "$scale_npz" "${rest[@]}"
cat <<END
Trained there: copy data/$DATASET to data/ of the checkout, and in its folder
python train.py --dataset $DATASET --n_embd_wte $k --bias --norm_variant_attn layernorm --norm_variant_output layernorm \\
  --import_wte_npy $(realpath "$wte_npy") --import_scale_matrices_npz $(realpath "$scale_npz")
with the shape of the baseline: --n_layer, --n_head, --n_embd, --block_size. What it exports with --export_wte_npy and
--export_scale_matrices_npz is [d,k]; train.py here reads it as it is.
END
