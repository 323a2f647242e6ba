#!/usr/bin/env bash
# Runs experiments 1-13 and their controls, and writes report.md and report.html.
#
# Usage:    bash scripts/run_13_experiments.sh [FLAGS]
# Example:  ONLY13=1 bash scripts/run_13_experiments.sh
#           K="8 16" SEEDS="1 2 3" bash scripts/run_13_experiments.sh
# Minutes:  about 25 on 2 CPU cores with ONLY13=1 (projected from 100 steps). The controls are not measured: they train 14 more
#           models, each with half of the baseline's steps, and evaluate 20 more.
#
# The same command again skips finished runs and resumes interrupted ones. If a run fails, the runs that start from it are
# skipped and all others go on.
#
#   FLAGS     go to every call of train.py: python train.py --help
#   K         ranks. Default: "64 128 256 512" with gpt2, "16 32 64 128" with laptop and laptop_adamw, otherwise "8 16 32 64"
#   METHODS   further factorizations, evaluated without training. Default: "centered freq whiten joint fisher"
#   BEST      one of them, which also gets adapters. Default: fisher
#   ONLY13    1: the thirteen alone, without METHODS, BEST and the controls. Default: not set
#   SEEDS     random seeds, e.g. "1 2 3": one round for each, in OUT/seed_N, and paired tests. Default: one round in OUT
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
