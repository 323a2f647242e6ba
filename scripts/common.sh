# Variables of the training scripts. Set them before the command: PRESET=laptop OUT=model_weights/mine bash scripts/...
# The minutes above are those of the default presets, on a machine without a GPU and without other work. On a GPU they are
# not measured.
#
#   PRESET    model, data and length of the training. Default without a GPU: laptop; laptop13 for experiments 1-13;
#             laptop_pythia for compressed values. Default if torch sees a GPU: gpt2; pythia70m for compressed values.
#             laptop_adamw is laptop's model trained by AdamW in 1,000 steps
#   DATASET   wikitext103, pile or sotu. Default: wikitext103 with gpt2, pile with pythia70m, otherwise sotu, which also takes
#             the place of the other two if their text cannot be had
#   OUT       folder of the run folders. Default: model_weights; model_weights/laptop13 with laptop13; model_weights/vdproj
#             with pythia70m and laptop_pythia
#   METHOD    how scripts that start from factors cut the token table: svd, centered, freq, whiten, joint or fisher.
#             Default: svd
#   LORA      further flags of train.py for the runs with adapters, e.g. "--lora_rank 4 --lora_alpha 8". Default: none
#   GPUS      cards for the scripts that train several models, one run on each, e.g. "0 1". Default: all visible cards; none
#             with a preset that begins with laptop

# The training scripts source this file after setup.sh, which prints the lines above as a part of their help. It picks preset,
# data and folder; train_run below runs train.py once.

source scripts/stages.sh

if [ -z "${PRESET:-}" ]; then
  # nvidia-smi first: it answers at once, importing torch takes seconds
  if command -v nvidia-smi >/dev/null && python -W ignore -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    PRESET=${WITH_GPU:-gpt2}
  else
    PRESET=${LAPTOP:-laptop} build=$(python common/versions.py build)
    if command -v nvidia-smi >/dev/null; then
      echo "on the CPU: nvidia-smi is here, and torch $build, sees no card. To use one, install a torch that its driver serves"
    elif [[ $build != *without* ]]; then
      echo "on the CPU: torch $build, finds no driver here"
    fi
  fi
fi
if [ -z "${OUT:-}" ]; then
  case $PRESET in
    laptop13) OUT=model_weights/laptop13 ;;
    *pythia*) OUT=model_weights/vdproj ;;
    *) OUT=model_weights ;;
  esac
fi
METHOD=${METHOD:-svd}
if [ -z "${DATASET:-}" ]; then
  case $PRESET in
    gpt2) DATASET=wikitext103 small="Its 2.5M tokens are few for this preset, which reads them 130 times: PRESET=laptop fits them" ;;
    pythia70m) DATASET=pile small="PRESET=laptop_pythia fits it" ;;
    *) DATASET=sotu ;;
  esac
  if [ "$DATASET" != sotu ] && [ ! -f "data/$DATASET/meta.pkl" ] && ! python "data/$DATASET/prepare.py"; then
    echo "data/$DATASET cannot be had here: taking the embedded text, DATASET=sotu. $small;"
    echo "data/$DATASET/prepare.py --local_dir takes its text from a folder."
    DATASET=sotu
  fi
fi
if [ -z "${PICKED:-}" ]; then
  echo "preset $PRESET, dataset $DATASET, folder $OUT; choose otherwise with PRESET=, DATASET=, OUT= before the command"
fi
export PRESET DATASET OUT METHOD PICKED=1
[ -f "data/$DATASET/meta.pkl" ] || [ ! -f "data/$DATASET/prepare.py" ] || python "data/$DATASET/prepare.py"

mistake() { echo "$(basename "$0"): error: $*" >&2; exit 2; }

need_preset() { case " $* " in *" $PRESET "*) ;; *) mistake "PRESET=$PRESET is not for this script: give one of $*" ;; esac; }

# unless_left_out WHAT: in a pipeline the stage that makes WHAT has failed, so this one is skipped
unless_left_out() {
  [ -n "${STAGE:-}" ] || return 0
  echo "$(basename "$0"): left out: $1" >&2
  exit "$LEFT_OUT"
}

# start_from FOLDER SCRIPT: refuses to start from a run that is not trained to its end
start_from() {
  source_run=$OUT/$1
  [ -f "$source_run/summary.json" ] || unless_left_out "$source_run is not trained to its end"
  [ -f "$source_run/summary.json" ] || mistake "Checkpoint not found, or not trained to its end: $source_run: run scripts/$2 first"
}

# same_optimizer FOLDER FLAGS...: whether a finished run had its preset's optimizer; runs of before had no such flag. A flag wins.
same_optimizer() {
  python -c 'import json, sys, train_args
args = json.load(open(sys.argv[1] + "/config.json"))["args"]
now = train_args.PRESETS.get(args["preset"], {}).get("optimizer", "adamw")
sys.exit("--optimizer" not in sys.argv and args.get("optimizer", "adamw") != now)' "$@"
}

# train_run FOLDER WANDB_NAME FLAGS...: starts the run, resumes an interrupted one, leaves a finished one alone
train_run() {
  local out=$OUT/$1 name=$2
  shift 2
  if [ -f "$out/summary.json" ]; then
    grep -Eq "\"preset\": \"$PRESET(_finetune|_lora|_recon)?\"" "$out/summary.json" ||
      mistake "$out was not run with PRESET=$PRESET: give its preset, or another OUT="
    same_optimizer "$out" "$@" ||
      mistake "$out was trained by another optimizer than PRESET=$PRESET has: PRESET=laptop_adamw, another OUT=, or delete it"
    [ -z "${source_run:-}" ] || [ ! "$source_run/ckpt.pt" -nt "$out/summary.json" ] ||
      mistake "$out started from an older $source_run: delete the folder to run it again"
    echo "$out is done; delete the folder to run it again"
    return
  fi
  if [ -f "$out/last.pt" ] || [ -f "$out/last.previous.pt" ]; then
    set -- "$@" --init_from resume
    echo "== $out: goes on from its last.pt"
  else
    echo "== $out"
  fi
  python train.py --dataset "$DATASET" --out_dir "$out" --wandb_run_name "$name" "$@"
}

# The scripts' first argument is the rank. Where it is missing or a flag of train.py, the rank is 128; 32 with laptop13; five
# eighths of the width with Pythia's presets.
take_rank() {
  case ${1:-} in
    "" | --*)
      case $PRESET in laptop13) k=32 ;; pythia70m) k=320 ;; laptop_pythia) k=80 ;; *) k=128 ;; esac
      rest=("$@")
      ;;
    *[!0-9]*) mistake "rank '$1' is not a number: give it first, e.g. 128" ;;
    *) k=$((10#$1)); rest=("${@:2}") ;;
  esac
}

# Makes the table's factors by $METHOD at ranks $1, or at rank $k, where they are missing or older than the baseline; in a
# stage of a pipeline they were made before. Sets method (pca for svd, as in the original scripts' file names), wte_npy, scale_npz, and
# from_factors, the flags that start from the baseline with these factors.
need_factors() {
  local rank
  missing=""
  start_from gpt_baseline train_baseline_gpt2.sh
  method=${METHOD/#svd/pca}
  for rank in ${1:-$k}; do
    wte_npy=$OUT/pca_factorized/wte_${method}_k$rank.npy scale_npz=$OUT/pca_factorized/scale_mats_${method}_k$rank.npz
    if [ ! -f "$wte_npy" ] || [ "$OUT/gpt_baseline/ckpt.pt" -nt "$wte_npy" ]; then missing+=",$rank"; fi
  done
  from_factors=(--n_embd_wte "$rank" --init_from prev_run --prev_run_ckpt "$OUT/gpt_baseline"
    --import_wte_npy "$wte_npy" --import_scale_matrices_npz "$scale_npz")
  [ -n "$missing" ] || return 0
  unless_left_out "$wte_npy is missing or older than the baseline"
  attend env STAGE=1 bash scripts/run_pca_factorization.sh "${missing#,}" --method "$METHOD"
}

# make_factors RANKS: need_factors as a stage of its own
make_factors() {
  local name="$OUT: run_pca_factorization.sh ${1// /,} --method $METHOD" status=0
  if [ ! -f "$OUT/gpt_baseline/summary.json" ]; then note "$LEFT_OUT" "$name" && return; fi
  need_factors "$1" || status=$?
  [ -n "$missing" ] || echo "the factors of $OUT by $METHOD at ranks ${1// /,} are done"
  note "$status" "$name"
}

# The adapters' rank, by LORA or by the preset. The original scripts put it into a run's name.
lora_rank() {
  local lora=" ${LORA:-} "
  case $lora in
    *" --lora_rank "*) lora=${lora#* --lora_rank } && echo "${lora%% *}" ;;
    *) python -c "import train_args; print(train_args.PRESETS['${PRESET}_lora']['lora_rank'])" ;;
  esac
}

# The cards for stages: GPUS="0 1". Default: all that are visible; none with a laptop's preset.
take_cards() {
  if [ -z "${GPUS+given}" ]; then
    if [ -n "${CUDA_VISIBLE_DEVICES+given}" ]; then
      GPUS=${CUDA_VISIBLE_DEVICES//,/ }
    elif [[ $PRESET != laptop* ]] && command -v nvidia-smi >/dev/null; then
      GPUS=$(nvidia-smi --query-gpu=index --format=csv,noheader | grep -E '^[0-9]+$' | tr '\n' ' ') || true
    fi
  fi
  read -ra cards <<< "${GPUS:-}"
  if [ ${#cards[@]} -eq 0 ]; then cards=(""); fi
}

# The report of what is done, then the names of what is not.
report_and_name_failures() {
  local status=0
  python report.py --runs "$root" --html || status=$?
  note "$status" "report.py --runs $root"
  name_failures
}
