#!/usr/bin/env bash
# Measures one cheap row of each study in results/ again, on this machine and commit, and compares it with the study's page.
#
# Usage:    bash scripts/verify_results.sh
# Example:  bash scripts/verify_results.sh
#           WIKI=path/to/wiki.valid.raw bash scripts/verify_results.sh
# Minutes:  7 on 2 quiet CPU cores (projected from its parts); 35 to 104 on busy ones.
#
# The exit status is 1 if a row differs. A loss may differ by 0.01 nats, half of the spread between two seeds, since arithmetic,
# processor and code are not those of then. Bytes may not differ.
#
#   WIKI      wiki.valid.raw of WikiText-103: surgery on SmolLM2 is measured too. Default: not set, that row is skipped
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
source scripts/stages.sh
out=model_weights/verify different=0
rm -rf "$out" && mkdir -p "$out"
export DATASET=sotu

# row PAGES WHAT NUMBER TOLERANCE KEYS COMMAND...: KEYS lead to the number in the JSON object that COMMAND prints last
row() {
  local page number=${3//[+,]/} measured verdict=same
  for page in $1; do
    grep -qF -- "$3" "results/$page" || { echo "verify_results.sh: error: results/$page has no $3" >&2; exit 2; }
  done
  "${@:6}" > "$out/log" || { echo "DIFFERENT  $1: $2: the command failed" && different=1 && return; }
  # shellcheck disable=SC2086  # the words of the keys
  measured=$(tail -n 1 "$out/log" | python -c 'import functools, json, sys
def inside(value, key): return value[int(key) if isinstance(value, list) else key]
print(functools.reduce(inside, sys.argv[1:], json.load(sys.stdin)))' $5)
  awk "BEGIN { d = $measured - $number; exit !(d <= $4 && d >= -$4) }" || { verdict=DIFFERENT && different=1; }
  echo "$verdict  $1: $2: $number there, $measured here (may differ by $4)"
}
baseline() { PRESET=$1 OUT=$out/$1 attend bash scripts/train_baseline_gpt2.sh --seed 1; }
own_table() {  # own_table ROW FLAGS...
  python -m surgery.bytes_study --system table --model "$out/laptop/gpt_baseline" --calib_text sotu --eval_text sotu \
    --window 128 --eval_windows 192 --calib_tokens 32768 --rows "untouched,$1" --out_dir "$out/own_${1// /_}" "${@:2}" &&
    tail -n 1 "$out/own_${1// /_}/results.jsonl"
}
one_basis() {
  python -m surgery --calib_text "$WIKI" --eval_text "$WIKI" --eval_windows 12 --answer_tokens 0 --targets k,v \
    --mode shared_kv --method svd --rank 288 --out_dir "$out/smollm2" && tail -n 1 "$out/smollm2/results.jsonl"
}

row vdproj/decoding_gpt2.md "bytes a token, compressed keys and values in int8" 11,568 0 "rows 2 bytes_per_token" \
  python bench.py decode --shape gpt2 --context 32 --steps 1 --rounds 1 --kv_dtypes int8
row laptop_muon/report.md "D by Muon, seed 1 here, mean of 1 to 3 there" 4.8585 0.01 "best val_loss" baseline laptop
row bytes/own/report.md "nats that rank 128 costs its table" +0.0338 0.002 "texts sotu nats" own_table "rank 128"
row "laptop_k128/README.md laptop_ranks/report.md" "D by AdamW, seed 1" 4.8793 0.01 "best val_loss" baseline laptop_adamw
row bytes/own/report.md "nats that its table by bits costs at 23%" +0.0040 0.002 "texts sotu nats" own_table bits --shares 0.23
row laptop13/README.md "the baseline of experiments 1-13, seed 1" 4.657 0.01 "best val_loss" baseline laptop13
# what a cut costs differs more between two baselines than their own losses do: by 0.020 between seeds
row laptop13/README.md "fisher at rank 16 without training, seed 1" 5.571 0.02 val_loss \
  attend env PRESET=laptop13 METHOD=fisher OUT="$out/laptop13" bash scripts/eval_pca_nofinetune.sh 16
if [ -n "${WIKI:-}" ]; then
  row smollm2/report.md "perplexity, k and v in one basis of 288 by svd" 43.82 0.05 ppl one_basis
else
  echo "not measured: smollm2, which needs WIKI=path/to/wiki.valid.raw of WikiText-103"
fi
cat << 'END'
not measured: bytes on SmolLM2, which needs that file, two texts of books, and 2 to 5 minutes a row (results/bytes)
not measured: the healed models smollm2_kv192, smollm2_wte256 and table13, whose weights are not in the repository
not measured: speed, whose numbers are times of another machine, and all other rows: the commands on their pages take hours
END
exit $different
