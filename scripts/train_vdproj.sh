#!/usr/bin/env bash
# Compresses the values in the cache: trains the models of scripts/train_vdproj_one.sh under the same conditions and writes
# report.md and report.html.
#
# Usage:    bash scripts/train_vdproj.sh [R] [FLAGS]
# Example:  ONLY5=1 bash scripts/train_vdproj.sh 80
#           SEEDS="1 2 3" bash scripts/train_vdproj.sh
# Minutes:  about 19 on 2 CPU cores with ONLY5=1 (projected from 150 steps), for each seed. two_phase_trained is not measured.
#
# The same command again skips finished runs and resumes interrupted ones. If a run fails, the runs that start from it are
# skipped and all others go on.
#
#   R         numbers that the cache keeps of each token's values, in each layer. Default: 320 with pythia70m, 80 with
#             laptop_pythia
#   FLAGS     go to every call of train.py: python train.py --help
#   ONLY5     1: without the model two_phase_trained. Default: not set
#   SEEDS     random seeds, e.g. "1 2 3": one round for each, in OUT/seed_N, and paired tests. Default: one round in OUT
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
