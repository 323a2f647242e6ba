#!/usr/bin/env bash
# Experiments 1-13 and the rows that they need beside them -> report.
#
#   bash scripts/run_13_experiments.sh                        flags for every train.py may follow
#   K="64 128 256 512"                                        ranks; left out: these with gpt2, 8 16 32 64 with laptop13
#   METHODS="centered freq whiten joint fisher" BEST=fisher   evaluated without training; trained on with adapters
#   ONLY13=1                                                  the thirteen alone
#   LORA="--lora_rank 4 --lora_alpha 8"                       flags for the runs with adapters only
#   SEEDS="1 2 3"                                             three rounds, in OUT/seed_N, and paired tests
#   GPUS="0 1"                                                cards, one run each; left out: all that are visible
#
# Finished runs are skipped, interrupted ones resumed. What starts from a run that fails is left out, all else goes on.
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
LAPTOP=laptop13
source scripts/common.sh
take_cards
root=$OUT
case $PRESET in gpt2) K=${K:-64 128 256 512} ;; laptop | laptop_adamw) K=${K:-16 32 64 128} ;; *) K=${K:-8 16 32 64} ;; esac
METHODS=${METHODS-centered freq whiten joint fisher} BEST=${BEST-fisher}
if [ -n "${ONLY13:-}" ]; then METHODS="" BEST=""; fi
# A mistake in ranks, methods or flags shows here, not after the baseline has been trained.
case $K in *[!0-9\ ]*) mistake "K=\"$K\": give ranks, e.g. K=\"64 128\"" ;; esac
K=$(python -c 'import sys; print(*dict.fromkeys(map(int, sys.argv[1:])))' $K)  # each once, 08 as 8
for METHOD in $METHODS $BEST; do
  python -c 'import sys; from util_factorization import METHODS as known; sys.exit(sys.argv[1] not in known)' "$METHOD" ||
    mistake "METHODS and BEST: $METHOD is no method of util_factorization/decompose_table.py"
done
METHODS=$(python -c 'import sys; print(*dict.fromkeys(m for m in sys.argv[1:] if m != "svd"))' $METHODS $BEST)  # svd is 6-13
if [ "$BEST" = svd ]; then BEST=""; fi
parse() { python -c 'import sys, train_args; sys.argv[0] = "run_13_experiments.sh"; train_args.parse_args()' "$@"; }
for k in $K; do
  start=(--init_from prev_run --prev_run_ckpt "$OUT/gpt_baseline" --n_embd_wte "$k")
  parse --preset "$PRESET" --n_embd_wte "$k" "$@"
  parse --preset "${PRESET}_finetune" "${start[@]}" "$@"
  # shellcheck disable=SC2086  # the words of LORA
  parse --preset "${PRESET}_lora" "${start[@]}" ${LORA:-} "$@"
done
echo "ranks $K, adapters of rank $(lora_rank)"

for seed in ${SEEDS:-""}; do
  flags=("$@")
  if [ -n "$seed" ]; then
    export OUT=$root/seed_$seed
    flags+=(--seed "$seed")
  fi
  begin "METHOD=svd train_baseline_gpt2.sh --wandb_run_name baseline"
  for k in $K; do begin "METHOD=svd train_lowrank_scratch.sh $k"; done
  await_all
  for METHOD in svd $METHODS; do make_factors "$K"; done
  for k in $K; do
    for METHOD in svd $METHODS; do begin "METHOD=$METHOD eval_pca_nofinetune.sh $k"; done
    for METHOD in svd $BEST; do begin "METHOD=$METHOD train_pca_lora.sh $k"; done
    if [ -z "${ONLY13:-}" ]; then begin "METHOD=svd train_pca_finetune.sh $k" && begin "METHOD=svd train_lowrank_more.sh $k"; fi
  done
  if [ -z "${ONLY13:-}" ]; then begin "METHOD=svd train_baseline_more.sh" && begin "METHOD=svd train_baseline_lora.sh"; fi
  await_all
done
report_and_name_failures
