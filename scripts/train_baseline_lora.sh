#!/usr/bin/env bash
# Trains adapters (LoRA) on the uncompressed baseline, with the same extra steps as experiments 10-13: their control.
#
# Usage:    bash scripts/train_baseline_lora.sh [FLAGS]
# Example:  LORA="--lora_rank 4" bash scripts/train_baseline_lora.sh
# Minutes:  not measured. It trains half as many steps as the baseline, which takes about 3 on 2 CPU cores.
#
# It needs the run of scripts/train_baseline_gpt2.sh with the same PRESET and OUT.
#
#   FLAGS     go to train.py: python train.py --help
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
LAPTOP=laptop13
source scripts/common.sh
start_from gpt_baseline train_baseline_gpt2.sh
# shellcheck disable=SC2086  # the words of LORA
train_run gpt_baseline_lora baseline-lora --preset "${PRESET}_lora" --init_from prev_run --prev_run_ckpt "$OUT/gpt_baseline" \
  --lora_targets wte,q_proj,k_proj,v_proj,c_proj,mlp_up,mlp_down ${LORA:-} "$@"  # a dense table has no scale matrices
