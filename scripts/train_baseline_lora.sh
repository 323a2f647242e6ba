#!/usr/bin/env bash
# The baseline, uncompressed, with adapters and the same extra steps: the control of 10-13. Further flags go to train.py.
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
LAPTOP=laptop13
source scripts/common.sh
start_from gpt_baseline train_baseline_gpt2.sh
# shellcheck disable=SC2086  # the words of LORA
train_run gpt_baseline_lora baseline-lora --preset "${PRESET}_lora" --init_from prev_run --prev_run_ckpt "$OUT/gpt_baseline" \
  --lora_targets wte,q_proj,k_proj,v_proj,c_proj,mlp_up,mlp_down ${LORA:-} "$@"  # a dense table has no scale matrices
