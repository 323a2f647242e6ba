# Puts a Python with the packages of requirements.txt first on PATH. Every script does this before its work.
#
# Usage:    bash scripts/setup.sh
# Example:  bash scripts/setup.sh
# Minutes:  2 to 3 for the first installation, more on a slow network; under a second afterwards.
#
# It uses the active environment if that has the packages that fit its torch (2.5.1 or newer, on Python 3.13 2.6 or newer).
# Otherwise it makes .venv with uv, or with venv and pip. It never replaces such a torch: .venv then borrows the packages of
# the active environment and adds the missing ones.
#
#   SKIP_SETUP   1: use the active Python as it is, for example on a cluster without a network. Default: not set
#   SETUP_TESTS  1: the packages of the tests are needed too. Default: not set, since runs do not need them

# A script sources this file without arguments, so "$@" here are the script's own, and "$0" is its path. Its help is the comment
# at its top; that of common.sh follows if the script sources it.
setup_head() { sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$1"; }

setup_help() {
  setup_head "$0"
  if grep -q '^source scripts/common.sh' "$0"; then echo && setup_head "$(dirname "$0")/common.sh"; fi
  case $0 in *setup.sh) ;; *) echo && echo "How it picks its Python, and SKIP_SETUP=1: bash scripts/setup.sh --help" ;; esac
}

for word in "$@"; do
  case $word in -h | --help) setup_help && exit 0 ;; esac
done

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repo"

setup_mistake() { echo "setup: error: $*" >&2; exit 2; }

setup_has() { "$1" common/versions.py met "$2" 2>/dev/null; }  # setup_has PYTHON main|tests

setup_has_all() { setup_has "$1" main && { [ -z "${SETUP_TESTS:-}" ] || setup_has "$1" tests; }; }

setup_install() {  # setup_install VENV main|tests: what it lacks
  local python=$1/bin/python list=$1/requirements_$2.txt override=()
  "$python" common/versions.py list "$2" > "$list"
  if ! grep -q '^torch==' "$1/requirements_main.txt"; then  # uv does not see a torch that is borrowed, and peft asks for one
    echo "torch; python_version < '3'" > "$1/no_torch.txt"
    override=(--override "$1/no_torch.txt")
  fi
  { command -v uv >/dev/null && uv pip install --quiet --python "$python" ${override[@]+"${override[@]}"} -r "$list"; } ||
    "$python" -m pip install --quiet --disable-pip-version-check -r "$list"
}

setup_make_venv() {
  local active=$1
  echo "setup: installing requirements.txt into .venv (some minutes, once; SKIP_SETUP=1 skips it)" >&2
  "$active" common/versions.py notes >&2
  if [ ! -x .venv/bin/python ]; then
    if command -v uv >/dev/null; then uv venv --quiet --seed --python "$active" .venv; else "$active" -m venv .venv; fi
  fi
  if "$active" common/versions.py keeps; then
    echo "setup: keeping the torch that is installed in $("$active" -c 'import sys; print(sys.prefix)')" >&2
    "$active" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
      > "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/active_environment.pth"
  fi
  setup_install .venv main || return
  setup_install .venv tests || echo "setup: the tools of the tests cannot be had, see above: all runs but bash scripts/test.sh" >&2
}

if [ "${SKIP_SETUP:-}" != 1 ]; then
  active=$(command -v python3 || command -v python) || setup_mistake "no python3 on PATH: install Python 3.10 to 3.13"
  "$active" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    setup_mistake "$active is $("$active" -V): put Python 3.10 to 3.13 first on PATH"
  if ! setup_has_all "$active"; then
    if ! { [ -x .venv/bin/python ] && setup_has_all .venv/bin/python; }; then
      setup_make_venv "$active" && setup_has_all .venv/bin/python ||
        setup_mistake ".venv could not be filled from requirements.txt: see the lines above; delete .venv to start afresh"
    fi
    active=$repo/.venv/bin/python
    export PATH="$repo/.venv/bin:$PATH"
  fi
  export SKIP_SETUP=1 SETUP_PYTHON=$active  # for the scripts that this one calls
fi
if [ -z "${SETUP_PYTHON:-}" ]; then SETUP_PYTHON=$(command -v python || command -v python3); fi
python() { "$SETUP_PYTHON" "$@"; }  # one interpreter for all, whether it is called python or python3
