#!/usr/bin/env bash
# C. Random-Scratch: random factors whose product has the std of a dense table (--factor_init naive: the seeds' draw),
# full training. Arguments: rank, then flags of train.py.
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
source scripts/common.sh
take_rank "$@"
train_run "gpt_random_lowrank_k$k" "gpt-random-lowrank-k$k" --preset "$PRESET" --n_embd_wte "$k" ${rest[@]+"${rest[@]}"}
