#!/usr/bin/env bash
# One model of train_vdproj.sh, by MODEL; a cache that keeps r numbers a token and layer. Arguments: r, then flags of train.py.
#
#   baseline            Pythia as it is
#   end_to_end          v_compress and v_restore trained with the rest, their error counted with weight 0.1
#   two_phase           phase 1 fits them to the values of the random network, phase 2 trains the rest with them frozen
#   two_phase_trained   the same, from the trained baseline
#   narrow              v_proj gives r numbers itself, nothing restores them
#   kv                  as end_to_end, and the keys as r numbers too
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
