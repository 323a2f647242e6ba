#!/usr/bin/env bash
# The main job: D -> PCA -> A, C, B and B's control -> report.
#
#   bash scripts/run_all_experiments.sh 128                   rank, then flags for every train.py
#   SEEDS="1 2 3" bash scripts/run_all_experiments.sh 128     three rounds, in OUT/seed_N, and a paired test
#   GPUS="0 1" ...                                            cards to use; left out, all that are visible
#
# Finished runs are skipped, interrupted ones resumed: the same command again goes on where it stopped.
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
source scripts/common.sh
take_rank "$@"
root=$OUT
# A mistake in the flags shows here, not after the baseline has been trained.
python -c 'import sys, train_args; sys.argv[0] = "train.py"; train_args.parse_args()' \
  --preset "$PRESET" --n_embd_wte "$k" ${rest[@]+"${rest[@]}"}

take_cards

# Runs a script, "NAME [RANK]", with the further flags, on one card where there are cards.
run() {
  local card=${2:-${gpus[0]:-}}
  # shellcheck disable=SC2086  # the name and the rank are two words
  ${card:+env CUDA_VISIBLE_DEVICES="$card"} bash scripts/$1 ${flags[@]+"${flags[@]}"}
}

# Two scripts side by side where there are two cards, one after the other elsewhere.
both() {
  if [ "${#gpus[@]}" -lt 2 ]; then run "$1" && run "$2"; return; fi
  run "$1" "${gpus[0]}" &
  local first=$! failed=0
  run "$2" "${gpus[1]}" || failed=1
  wait "$first" || failed=1
  return "$failed"
}

for seed in ${SEEDS:-""}; do
  flags=(${rest[@]+"${rest[@]}"})
  if [ -n "$seed" ]; then
    export OUT=$root/seed_$seed
    flags+=(--seed "$seed")
  fi
  run train_baseline_gpt2.sh
  need_factors
  both "train_pca_compressed.sh $k" "train_random_lowrank.sh $k"
  both "train_pca_finetune.sh $k" "train_baseline_more.sh"
done
python report.py --runs "$root"
