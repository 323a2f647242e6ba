#!/usr/bin/env bash
# Runs the main job: it trains the dense baseline (D), factorizes its token table by PCA, trains four comparisons (A, B, C and
# D+) and writes report.md and report.html.
#
# Usage:    bash scripts/run_all_experiments.sh [RANK] [FLAGS]
# Example:  bash scripts/run_all_experiments.sh 128
#           SEEDS="1 2 3" bash scripts/run_all_experiments.sh 128
# Minutes:  4 on 2 CPU cores, for each seed.
#
# The same command again skips finished runs and resumes interrupted ones. If a run fails, the runs that start from it are
# skipped and all others go on.
#
#   RANK      numbers of each token in the compressed table. Default: 128, and 32 with laptop13
#   FLAGS     go to every call of train.py: python train.py --help
#   SEEDS     random seeds, e.g. "1 2 3": one round for each, in OUT/seed_N, and a paired test. Default: one round in OUT
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
source scripts/common.sh
take_rank "$@"
root=$OUT
# Steps of a model from scratch, and of one that is trained on. A mistake in the flags shows here, before anything is trained.
steps_of() { python -c 'import sys, train_args; sys.argv[0] = "train.py"; print(train_args.parse_args()[0].max_iters)' "$@"; }
scratch=$(steps_of --preset "$PRESET" --n_embd_wte "$k" ${rest[@]+"${rest[@]}"})
more=$(steps_of --preset "${PRESET}_finetune" ${rest[@]+"${rest[@]}"})

take_cards
side=$((${#cards[@]} < 2 ? 1 : 2))  # runs side by side
read -ra seeds <<< "${SEEDS:-}"
rounds=$((${#seeds[@]} ? ${#seeds[@]} : 1))
model=0 models=$((5 * rounds)) left=$((rounds * (scratch + 2 * (scratch + more) / side)))

# announce STEPS WHAT: names the model. JOB_LATER_STEPS, steps after it, lets train.py say the time left of the whole job.
announce() {
  model=$((model + 1)) left=$((left - $1))
  export JOB_LATER_STEPS=$left
  echo "model $model of $models${seed:+, seed $seed}: $2"
}

# both STEPS WHAT STAGE WHAT STAGE: two stages side by side where there are two cards, one after the other elsewhere.
both() {
  await_card && announce $(($1 / side)) "$2" && begin "$3"
  await_card && announce $(($1 / side)) "$4" && begin "$5"
  await_all
}

for seed in ${SEEDS:-""}; do
  flags=(${rest[@]+"${rest[@]}"})
  if [ -n "$seed" ]; then
    export OUT=$root/seed_$seed
    flags+=(--seed "$seed")
  fi
  announce "$scratch" "D, the dense baseline"
  begin train_baseline_gpt2.sh
  await_all
  make_factors "$k"
  both "$scratch" "A, the PCA of D's table, the rest from scratch" "train_pca_compressed.sh $k" \
    "C, random factors, from scratch" "train_random_lowrank.sh $k"
  both "$more" "B, D with its table cut by PCA, trained on" "train_pca_finetune.sh $k" \
    "D+, D with the same extra steps" train_baseline_more.sh
done
unset JOB_LATER_STEPS
report_and_name_failures
