#!/usr/bin/env bash
# The baseline's factors in ReaLLMASIC/nanoGPT: its own import gives our logits, then the command that trains there from them.
#   git clone https://github.com/ReaLLMASIC/nanoGPT path/to/checkout, and pip install rich: its model.py prints with it
#   bash scripts/reallmasic.sh path/to/checkout 128
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
