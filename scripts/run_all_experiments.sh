#!/usr/bin/env bash
# The main job: D -> PCA -> A, C, B and B's control -> report.
#
#   bash scripts/run_all_experiments.sh 128                   rank, then flags for every train.py
#   SEEDS="1 2 3" bash scripts/run_all_experiments.sh 128     three rounds, in OUT/seed_N, and a paired test
#   GPUS="0 1" ...                                            cards to use; left out, all that are visible
#
# Finished runs are skipped, interrupted ones resumed: the same command again goes on where it stopped.
source "$(dirname "$0")/setup.sh"
source "$(dirname "$0")/common.sh"
take_rank "$@"
root=$OUT

if [ -z "${GPUS:-}" ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then GPUS=${CUDA_VISIBLE_DEVICES//,/ }; fi
if [ -z "${GPUS:-}" ] && command -v nvidia-smi >/dev/null; then GPUS=$(nvidia-smi --query-gpu=index --format=csv,noheader | tr '\n' ' '); fi
read -ra gpus <<< "${GPUS:-}"

# Two commands side by side where there are two cards, one after the other elsewhere.
both() {
  if [ "${#gpus[@]}" -ge 2 ]; then
    CUDA_VISIBLE_DEVICES=${gpus[0]} bash -c "$1" &
    local first=$! failed=0
    CUDA_VISIBLE_DEVICES=${gpus[1]} bash -c "$2" || failed=1
    wait "$first" || failed=1
    return "$failed"
  fi
  bash -c "$1" && bash -c "$2"
}

flags=$(printf '%q ' "${rest[@]}")
for seed in ${SEEDS:-""}; do
  more=$flags
  if [ -n "$seed" ]; then
    export OUT=$root/seed_$seed
    more="--seed $seed $flags"
  fi
  bash -c "bash scripts/train_baseline_gpt2.sh $more"
  if [ ! -f "$OUT/pca_factorized/wte_pca_k$k.npy" ] || [ "$OUT/gpt_baseline/ckpt.pt" -nt "$OUT/pca_factorized/wte_pca_k$k.npy" ]; then
    bash scripts/run_pca_factorization.sh "$k"
  fi
  both "bash scripts/train_pca_compressed.sh $k $more" "bash scripts/train_random_lowrank.sh $k $more"
  both "bash scripts/train_pca_finetune.sh $k $more" "bash scripts/train_baseline_more.sh $more"
done
python report.py --runs "$root"
