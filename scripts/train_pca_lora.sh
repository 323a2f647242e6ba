#!/usr/bin/env bash
# Experiments 10-13. The baseline with its table factorized (METHOD=svd), adapters trained on both sides of the table and in
# the blocks, everything else frozen. Arguments: rank, then flags of train.py.
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
LAPTOP=laptop13
source scripts/common.sh
take_rank "$@"
need_factors
# shellcheck disable=SC2086  # the words of LORA
train_run "gpt_${method}_lora_k$k" "$method-lora-k$k-r$(lora_rank)" --preset "${PRESET}_lora" \
  "${from_factors[@]}" ${LORA:-} ${rest[@]+"${rest[@]}"}
