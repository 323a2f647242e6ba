# Sourced by every script (or run alone): puts a Python with everything in requirements.txt first on PATH.
#
#   the active environment   if it has the pinned packages and torch >= 2.5.1
#   .venv                    otherwise; made here by uv, or venv and pip. An active torch >= 2.5.1 is never replaced:
#                            .venv then borrows that environment's packages and adds the missing ones
#   SKIP_SETUP=1             takes the active Python as it is (a cluster without a network)

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repo"

setup_has_all() {  # a python whose packages meet requirements.txt; reads metadata only, 0.1 s
  "$1" - <<'PY' 2>/dev/null
import importlib.metadata as metadata, sys
from packaging.requirements import Requirement
from packaging.version import Version
for line in open("requirements.txt"):
    line = line.split("#")[0].strip()
    if not line: continue
    need = Requirement(line)
    if need.marker and not need.marker.evaluate(): continue
    have = Version(metadata.version(need.name))
    if not (have >= Version("2.5.1") if need.name == "torch" else have in need.specifier): sys.exit(1)
PY
}

setup_has_torch() {
  "$1" -c 'import importlib.metadata as m, re, sys; v = re.findall(r"\d+", m.version("torch"))
sys.exit([int(n) for n in v[:3]] < [2, 5, 1])' 2>/dev/null
}

setup_make_venv() {
  local active=$1 wanted=requirements.txt keep=()
  echo "setup: installing requirements.txt into .venv (some minutes, once; SKIP_SETUP=1 skips it)" >&2
  if [ ! -x .venv/bin/python ]; then
    if command -v uv >/dev/null; then uv venv --quiet --seed --python "$active" .venv; else "$active" -m venv .venv; fi
  fi
  if setup_has_torch "$active"; then
    echo "setup: keeping the torch that is installed in $("$active" -c 'import sys; print(sys.prefix)')" >&2
    "$active" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
      > "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/active_environment.pth"
    wanted=.venv/requirements_without_torch.txt
    grep -v '^torch==' requirements.txt > "$wanted"
    echo "torch; python_version < '3'" > .venv/no_torch.txt  # uv does not see a borrowed one, and peft asks for one
    keep=(--override .venv/no_torch.txt)
  fi
  { command -v uv >/dev/null && uv pip install --quiet --python .venv/bin/python ${keep[@]+"${keep[@]}"} -r "$wanted"; } ||
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$wanted"
}

if [ "${SKIP_SETUP:-}" != 1 ]; then
  active=$(command -v python3 || command -v python) || { echo "setup: error: no python3 on PATH: install Python 3.10 or newer" >&2; exit 2; }
  "$active" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "setup: error: $active is $("$active" -V): put Python 3.10 or newer first on PATH" >&2; exit 2; }
  if ! setup_has_all "$active"; then
    if ! { [ -x .venv/bin/python ] && setup_has_all .venv/bin/python; }; then
      setup_make_venv "$active" && setup_has_all .venv/bin/python ||
        { echo "setup: error: .venv could not be filled from requirements.txt: see the lines above; delete .venv to start afresh" >&2; exit 2; }
    fi
    active=$repo/.venv/bin/python
    export PATH="$repo/.venv/bin:$PATH"
  fi
  export SKIP_SETUP=1 SETUP_PYTHON=$active  # for the scripts that this one calls
fi
if [ -z "${SETUP_PYTHON:-}" ]; then SETUP_PYTHON=$(command -v python || command -v python3); fi
python() { "$SETUP_PYTHON" "$@"; }  # one interpreter for all, whether it is called python or python3
