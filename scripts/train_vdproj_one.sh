#!/usr/bin/env bash
# Trains one of the models of scripts/train_vdproj.sh, whose cache keeps R numbers of each token's values.
#
# Usage:    MODEL=NAME bash scripts/train_vdproj_one.sh [R] [FLAGS]
# Example:  MODEL=kv bash scripts/train_vdproj_one.sh 80
# Minutes:  all models but two_phase_trained take about 19 together on 2 CPU cores (projected from 150 steps).
#           two_phase_trained is not measured.
#
#   R         numbers that the cache keeps of each token's values, in each layer. Default: 320 with pythia70m, 80 with
#             laptop_pythia
#   FLAGS     go to train.py: python train.py --help
#   MODEL     which model. It has no default:
#               baseline            Pythia without compression
#               end_to_end          v_compress and v_restore are trained with all other weights; their reconstruction error
#                                   counts 0.1 in the loss
#               two_phase           phase 1 fits the two to the values of the untrained network; phase 2 freezes them and
#                                   trains all other weights
#               two_phase_trained   the same, starting from the trained baseline, which has to be there
#               narrow              v_proj itself gives R numbers, and nothing restores more
#               kv                  as end_to_end, with the keys compressed to R numbers too
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
LAPTOP=laptop_pythia WITH_GPU=pythia70m
source scripts/common.sh
need_preset pythia70m laptop_pythia
take_rank "$@"

run() {  # run FOLDER PRESET FLAGS...
  local folder=$1 preset=$2
  shift 2
  train_run "$folder" "${folder//_/-}" --preset "$preset" "$@" ${rest[@]+"${rest[@]}"}
}

phases() {  # phases SUFFIX FLAGS...: FLAGS are where phase 1 starts from
  local phase1=vdproj_phase1$1_r$k
  shift
  run "$phase1" "${PRESET}_recon" --v_proj_dim "$k" "$@"
  start_from "$phase1" "train_vdproj_one.sh"
  run "${phase1/phase1/two_phase}" "$PRESET" --init_from prev_run --prev_run_ckpt "$OUT/$phase1" --freeze v_compress,v_restore
}

case ${MODEL:-} in
  baseline) run pythia_baseline "$PRESET" ;;
  end_to_end) run "vdproj_end_to_end_r$k" "$PRESET" --v_proj_dim "$k" --v_recon_weight 0.1 ;;
  two_phase) phases "" ;;
  two_phase_trained)
    start_from pythia_baseline "train_vdproj.sh"
    phases _trained --init_from prev_run --prev_run_ckpt "$OUT/pythia_baseline"
    ;;
  narrow) run "vdproj_narrow_r$k" "$PRESET" --v_proj_dim "$k" --v_proj_narrow ;;
  kv) run "kvdproj_end_to_end_r$k" "$PRESET" --v_proj_dim "$k" --v_recon_weight 0.1 --k_proj_dim "$k" ;;
  *) mistake "MODEL='${MODEL:-}': give one of baseline, end_to_end, two_phase, two_phase_trained, narrow, kv" ;;
esac
