#!/usr/bin/env bash
# Cuts the baseline's token table to a rank and trains adapters (LoRA) on both sides of the table and in the blocks; all other
# weights are frozen. These are experiments 10-13.
#
# Usage:    bash scripts/train_pca_lora.sh [RANK] [FLAGS]
# Example:  LORA="--lora_rank 4" bash scripts/train_pca_lora.sh 32
# Minutes:  about 2 on 2 CPU cores (projected from 100 steps).
#
# It needs the run of scripts/train_baseline_gpt2.sh with the same PRESET and OUT. It makes the factors if they are missing.
#
#   RANK      numbers of each token in the compressed table. Default: 128, and 32 with laptop13
#   FLAGS     go to train.py: python train.py --help
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
LAPTOP=laptop13
source scripts/common.sh
take_rank "$@"
need_factors
# shellcheck disable=SC2086  # the words of LORA
train_run "gpt_${method}_lora_k$k" "$method-lora-k$k-r$(lora_rank)" --preset "${PRESET}_lora" \
  "${from_factors[@]}" ${LORA:-} ${rest[@]+"${rest[@]}"}
