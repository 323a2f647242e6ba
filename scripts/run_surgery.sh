#!/usr/bin/env bash
# Surgery on a real model: the seed's thresholds in every mode, its branch as it really ran, every method by rank, the table.
# What is done is skipped, so the same command resumes. Arguments go to every call of surgery.py.
#   bash scripts/run_surgery.sh
#   MODEL=path/to/folder OUT=model_weights/mine bash scripts/run_surgery.sh --eval_windows 32
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
operate() {
  python util_factorization/surgery.py ${MODEL:+--model "$MODEL"} --out_dir "${OUT:-model_weights/surgery}" "$@"
}
operate --mode separate,shared_kv,shared_layers "$@"                                       # 9 thresholds x 3 modes
operate --seed_faithful "$@"
operate --targets k/v/k,v --method svd,whiten,fisher --rank "${K:-160,128,96}" "$@"
operate --targets k,v --mode shared_kv --method svd,whiten,fisher --rank "${KV:-320,288,192}" "$@"
operate --targets wte --method svd,freq,whiten,joint,fisher --rank "${WTE:-384,256,128,64}" "$@"
