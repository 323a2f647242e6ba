#!/usr/bin/env bash
# Compressed values: the models of scripts/train_vdproj_one.sh under the same conditions -> report.
#
#   bash scripts/train_vdproj.sh 80                numbers a token that the cache holds for the values, then flags for every
#                                                  train.py; left out: 320 with pythia70m, 80 with laptop_pythia
#   ONLY5=1                                        the seed's models, narrow head and K+V, without phase 1 on a trained network
#   SEEDS="1 2 3"                                  three rounds, in OUT/seed_N, and paired tests
#   GPUS="0 1"                                     cards, one run each; left out: all that are visible
#
# Finished runs are skipped, interrupted ones resumed. What starts from a run that fails is left out, all else goes on.
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
LAPTOP=laptop_pythia WITH_GPU=pythia70m
source scripts/common.sh
need_preset pythia70m laptop_pythia
take_rank "$@"
take_cards
root=$OUT
# A mistake in the flags shows here, not after the first model.
case " ${rest[*]-} " in *_proj_*) mistake "${rest[*]}: the models' own flags are the script's, the width comes first" ;; esac
for flag in --no-v_proj_narrow --v_proj_narrow; do
  python -c 'import sys, train_args; sys.argv[0] = "train_vdproj.sh"; train_args.parse_args()' \
    --preset "$PRESET" --v_proj_dim "$k" --k_proj_dim "$k" "$flag" ${rest[@]+"${rest[@]}"}
done
for seed in ${SEEDS:-""}; do
  flags=(${rest[@]+"${rest[@]}"})
  if [ -n "$seed" ]; then
    export OUT=$root/seed_$seed
    flags+=(--seed "$seed")
  fi
  for model in baseline end_to_end two_phase narrow kv; do begin "MODEL=$model train_vdproj_one.sh $k"; done
  await_all
  if [ -z "${ONLY5:-}" ]; then begin "MODEL=two_phase_trained train_vdproj_one.sh $k" && await_all; fi
done
report_and_name_failures
