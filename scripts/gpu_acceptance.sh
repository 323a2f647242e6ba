#!/usr/bin/env bash
# Measures what only a GPU can show, without a network. $OUT/report.md gets a table for each part and the loss curve;
# $OUT/report.json gets the numbers.
#
# Usage:    bash scripts/gpu_acceptance.sh
# Example:  bash scripts/gpu_acceptance.sh
#           VS=path/to/nanoGPT DATA=path/to/books.txt bash scripts/gpu_acceptance.sh
#           PARTS="arithmetic cards" bash scripts/gpu_acceptance.sh
# Minutes:  under 9 on a GPU, by LIMIT. With TOY=1 they are not measured.
#
# If the time is over before all parts are done, give the same command again: it skips the parts that are done.
#
#   DATA      a text file, whose first 60 MB become GPT-2's tokens, or a folder with train.bin, val.bin and meta.pkl.
#             Default: data/wikitext103 if it is prepared, otherwise data/sotu, whose vocabulary is 4,096 and not 50,257
#   VS        a checkout of nanoGPT to compare with. Default: none
#   OUT       folder of the results. Default: model_weights/gpu_acceptance
#   LIMIT     seconds for all parts together. Default: 500
#   TOY       1: on the CPU and at toy size, which shows that the script runs and says nothing about a GPU. Default: not set
#   CARDS     with TOY=1, how many processes stand for cards. Default: 1
#   PARTS     some of these. Default: all
#               arithmetic  20 steps of a small model in float32, float16 and bfloat16, the last two compiled too, beside
#                           float32 on the CPU
#               dense       bench.py train, 4 micro-steps of 4 x 2,048 tokens at GPT-2's shape; with VS beside nanoGPT
#               preset      the first 300 of the gpt2 preset's 10,000 steps: loss, speed, memory. It resumes if interrupted
#               factorized  as dense, with a token table of rank 128
#               lora        as dense, with adapters on the factorized model
#               cache       text of the part preset's model, written with its cache, without it, and on the CPU
#               decoding    bench.py decode at GPT-2's shape, context 1,024
#               cards       the small model on all cards by DDP, beside one card; 30 steps of the gpt2 preset. Needs two cards
set -euo pipefail
export TORCHINDUCTOR_FX_GRAPH_CACHE=1  # a model that was compiled for its memory is not compiled again for its speed
VS=${VS:+$(realpath "$VS")}
if [ -e "${DATA:-}" ]; then DATA=$(realpath "$DATA"); fi
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
OUT=${OUT:-model_weights/gpu_acceptance} DATA=${DATA:-} end=$((SECONDS + ${LIMIT:-500})) unfinished=""
mistake() { echo "$(basename "$0"): error: $*" >&2; exit 2; }

small=(--preset laptop_adamw --max_iters 20 --warmup_iters 5 --eval_interval 20 --eval_iters 2 --log_interval 1)
gpt2=(--preset gpt2 --lr_decay_iters 10000 --eval_iters 25)
if [ -n "${TOY:-}" ]; then
  device=cpu half=bfloat16 cards=${CARDS:-1} few=2 many=4 every=2 settings=("bfloat16 --no-compile")
  tiny=(--n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --batch_size 2)
  small+=("${tiny[@]}" --max_iters 6)
  gpt2+=("${tiny[@]}" --eval_iters 2 --device cpu --no-compile)
  bench=(--shape laptop --vocab_size 97 --block_size 16 --micro_steps 2 --steps 1 --rounds 1)
  decode=(--shape laptop --vocab_size 97 --context 16 --steps 2 --rounds 1 --kv_dtypes float32,int8)
else
  read -r cards half < <(python -c 'import torch
cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(cards, "bfloat16" if cards and torch.cuda.is_bf16_supported(including_emulation=False) else "float16")')
  [ "$cards" -gt 0 ] || mistake "torch sees no GPU here: TOY=1 before the command runs it on the CPU, at toy size"
  device=cuda few=30 many=300 every=100
  settings=("float32 --no-compile" "float16 --no-compile" "float16 --compile")
  if [ "$half" = bfloat16 ]; then settings+=("bfloat16 --no-compile" "bfloat16 --compile"); fi
  bench=(--shape gpt2 --batch_size 4 --block_size 2048 --micro_steps 4 --steps 2 --rounds 2 --compile)
  decode=(--shape gpt2 --context 1024 --steps 16 --rounds 2 --kv_dtypes float32,float16,int8)
fi
gpt2+=(--dtype "$half")

# limited PROGRAM FLAGS...: python, until the time of its part is over
limited() {
  local left=$((part_end - SECONDS))
  timeout --foreground --kill-after 15 "$((left > 0 ? left : 1))" "$SETUP_PYTHON" "$@"
}

# train FOLDER FLAGS...: starts the run, resumes an interrupted one, leaves a finished one alone. LAUNCH: words before train.py
train() {
  local out=$OUT/$1
  shift
  [ ! -f "$out/summary.json" ] || return 0
  if [ -f "$out/last.pt" ]; then set -- "$@" --init_from resume; fi
  # shellcheck disable=SC2086  # words
  limited ${LAUNCH:-} train.py --dataset "$DATA" --out_dir "$out" "$@"
}

arithmetic() {  # side by side: the models are small, and most of the time is the compiler's
  local setting process running=() status=0
  train small/cpu_float32 "${small[@]}" --device cpu --dtype float32 &
  running+=($!)
  for setting in "${settings[@]}"; do
    # shellcheck disable=SC2086  # words
    train "small/$(sed 's/ --no-/_not_/; s/ --/_/; s/compile/compiled/' <<< "$setting")" \
      "${small[@]}" --device "$device" --dtype $setting &
    running+=($!)
  done
  for process in "${running[@]}"; do wait "$process" || status=$?; done
  return $status
}

step_of() { limited bench.py train "${bench[@]}" --device "$device" --dtypes "$half" --models "$1" --out "$OUT/$1.md" "${@:2}"; }
dense() { step_of dense ${VS:+--vs "$VS"}; }
factorized() { step_of factorized; }
lora() { step_of lora; }

preset() { train gpt2 "${gpt2[@]}" --max_iters $many --eval_interval $every; }

write() { limited sample.py --ckpt_path "$OUT/gpt2" --temperature 0 --max_new_tokens 64 --prompt_ids 1,2,3 "${@:2}" > "$OUT/text_$1"; }
cache() {
  [ -f "$OUT/gpt2/summary.json" ] || { echo "cache needs the model of the part preset, which is not done" >&2; return 1; }
  write cpu --device cpu && write without_cache --device "$device" --no-kv_cache && write through_cache --device "$device"
}

decoding() { limited bench.py decode "${decode[@]}" --device "$device" --out "$OUT/decoding.md" ${VS:+--vs "$VS"}; }

cards() {
  [ "$cards" -gt 1 ] || return 0
  local each=("${small[@]}" --device "$device" --dtype float32 --gradient_accumulation_steps "$cards")
  train cards/one "${each[@]}" || return
  local LAUNCH="-m torch.distributed.run --standalone --nproc_per_node=$cards"
  train cards/all "${each[@]}" &&
    train cards/gpt2 "${gpt2[@]}" --gradient_accumulation_steps $((4 * cards)) --max_iters $few --eval_interval $few
}

# part NAME SECONDS: runs a part, unless it is done, and adds its line to results.jsonl
part() {
  local begin=$SECONDS status=0 result
  case " ${PARTS:-$1} " in *" $1 "*) ;; *) return 0 ;; esac
  if grep -qs "^{\"part\": \"$1\"" "$OUT/results.jsonl"; then
    echo "== $1 is done; delete its line in $OUT/results.jsonl to measure it again"
    return
  fi
  part_end=$((SECONDS + $2 < end ? SECONDS + $2 : end))
  if [ "$part_end" -lt $((SECONDS + 10)) ]; then unfinished+=" $1"; return; fi
  echo "== $1, at most $((part_end - SECONDS)) seconds"
  "$1" | tee "$OUT/$1.log" || status=$?
  if [ $status = 0 ]; then
    result=$(tail -n 1 "$OUT/$1.log")
    case $result in "{"*"}") ;; *) result=null ;; esac
    echo "{\"part\": \"$1\", \"seconds\": $((SECONDS - begin)), \"result\": $result}" >> "$OUT/results.jsonl"
  else
    unfinished+=" $1"
    if [ $status = 124 ] || [ $status = 137 ]; then echo "== $1 did not end in time" >&2; else echo "== $1 failed with status $status" >&2; fi
  fi
}

# -- the text ---------------------------------------------------------------------------------------------------------

mkdir -p "$OUT"
if [ -z "$DATA" ]; then
  DATA=wikitext103
  [ -f data/wikitext103/meta.pkl ] || DATA=sotu
  [ -f data/$DATA/meta.pkl ] || python data/$DATA/prepare.py
elif [ -f "$DATA" ]; then
  if [ ! -f "$OUT/data/meta.pkl" ]; then
    val=$(($(wc -c < "$DATA") / 20)) && val=$((val < 2000000 ? val : 2000000)) train=$(($(wc -c < "$DATA") - val))
    mkdir -p "$OUT/text"  # the lines that the cuts leave incomplete are dropped
    head -c $((train < 60000000 ? train : 60000000)) "$DATA" | sed '$d' > "$OUT/text/wiki.train.raw"
    tail -c $val "$DATA" | sed 1d > "$OUT/text/wiki.valid.raw"
    python data/wikitext103/prepare.py --local_dir "$OUT/text" --out_dir "$OUT/data"
  fi
  DATA=$OUT/data
elif [ ! -f "$DATA/meta.pkl" ]; then
  mistake "DATA=$DATA is neither a text file nor a folder with train.bin, val.bin and meta.pkl: give one"
fi

# -- the parts, the most telling first --------------------------------------------------------------------------------

part arithmetic 120
part dense 200
part preset 240
part factorized 120
part lora 120
part cache 40
part decoding 60
part cards 150
python -m reports.gpu --runs "$OUT"
[ -z "$unfinished" ] || { echo "$(basename "$0"): not done:$unfinished. The same command goes on" >&2; exit 1; }
