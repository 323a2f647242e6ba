#!/usr/bin/env bash
# Tests the project on the oldest torch that it supports. scripts/test.sh --oldest calls it.
#
# Usage:    bash scripts/test_oldest.sh [ARGUMENTS]
# Example:  bash scripts/test_oldest.sh
# Minutes:  not measured. The first call downloads 3 GB; later ones depend on the quick tests and on torch's compiler.
#
# It does four things:
#   1. it makes a venv with that torch (its CUDA build, as a first user has it) in ~/.cache/nanopca
#   2. it runs the quick tests in this venv
#   3. it runs the main job at toy size, compiled by torch's default compiler
#   4. it trains 20 steps of the laptop preset on the oldest and on the current torch: the losses have to agree to 1e-4
#
# Not covered: a GPU, float16 on a GPU, Triton, the tests that run whole programs, and the main job at full size.
#
#   ARGUMENTS       go to pytest
#   XDG_CACHE_HOME  the folder of nanopca/. Default: ~/.cache
set -euo pipefail
source "$(dirname "$0")/setup.sh"
pinned=$SETUP_PYTHON
oldest=$(python -c 'from common.versions import oldest; print(oldest())')
minor=$(python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
venv=${XDG_CACHE_HOME:-$HOME/.cache}/nanopca/torch-$oldest-python$minor
say() { echo "test.sh --oldest: $*"; }

have_venv() {
  [ -x "$venv/bin/python" ] && [ "$("$venv/bin/python" -c 'from common.versions import installed; print(installed("torch"))')" = "$oldest" ] &&
    setup_has "$venv/bin/python" main && setup_has "$venv/bin/python" tests
}
make_venv() {
  say "making $venv: gigabytes, once"
  python -m venv "$venv" && "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==$oldest" &&
    setup_install "$venv" main && setup_install "$venv" tests && have_venv
}
have_venv || make_venv || { say "NOT RUN: torch $oldest cannot be installed for Python $minor, see above. Nothing is known of it" >&2; exit 3; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export SETUP_PYTHON=$venv/bin/python PATH=$venv/bin:$PATH TORCHINDUCTOR_CACHE_DIR=$work/compiled PRESET=laptop DATASET=sotu
"$SETUP_PYTHON" common/versions.py notes
"$SETUP_PYTHON" -m pytest -m "not slow" "$@"

say "the main job at toy size, compiled"
OUT=$work/main bash scripts/run_all_experiments.sh 16 --n_layer 1 --n_head 2 --n_embd 32 --block_size 32 --batch_size 2 \
  --max_iters 4 --warmup_iters 1 --eval_interval 2 --eval_iters 2 --dtype float32 --compile
for run in gpt_baseline gpt_pca_k16 gpt_random_lowrank_k16 gpt_pca_finetune_k16 gpt_baseline_more; do
  grep -q '"compiled": true' "$work/main/$run/summary.json" || { say "$run was not compiled" >&2; exit 1; }
done

say "the loss, the gradients and ten steps by the default compiler"
COMPILE_BACKEND=inductor "$SETUP_PYTHON" -m pytest tests/test_compile.py -k "equal_eager and dense"

if [ "$("$pinned" common/versions.py build)" = "$("$SETUP_PYTHON" common/versions.py build)" ]; then
  say "the quick tests passed and the main job ran compiled. The active torch is the oldest: there is no other to compare with"
  exit
fi
for python in "$pinned" "$SETUP_PYTHON"; do
  "$python" train.py --preset laptop --dtype float32 --max_iters 20 --warmup_iters 5 --eval_interval 20 --eval_iters 8 --log_interval 1 \
    --out_dir "$work/steps/$("$python" -c 'from common.versions import installed; print(installed("torch"))')" > /dev/null
done
"$SETUP_PYTHON" - "$work/steps" "$venv" <<'PY'
import json, sys
from pathlib import Path
from common.versions import installed

losses = {}
for path in sorted(Path(sys.argv[1]).glob("*/metrics.jsonl")):
    lines = map(json.loads, path.read_text().splitlines())
    losses[path.parent.name] = [line["train_loss"] for line in lines if "train_loss" in line]
(one, a), *other = losses.items()
two, b = other[0] if other else (one, a)
apart = max(abs(x - y) for x, y in zip(a, b, strict=True))
print(
    f"test.sh --oldest: torch {installed('torch')}, transformers {installed('transformers')}, Python {sys.version.split()[0]}: quick "
    f"tests passed, the main job ran compiled, {len(a)} losses of torch {one} and {two} differ by {apart:.1e} at most. Not covered: "
    "a GPU, Triton, the tests that run whole programs, the main job at full size"
)
sys.exit(len(a) != 20 or not apart < 1e-4)
PY
