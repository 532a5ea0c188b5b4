#!/usr/bin/env bash
# Set up if needed, then check the style of shell and Python and run the tests.
#
# Usage: bash tests/run.sh [lint|slow|faults|gpu|browser|extras|all] [PYTEST OPTION]...
#   (nothing)  style and the default tests: 20 minutes on 2 busy cores
#   lint       style only: shellcheck, ruff
#   slow       tests of more than a minute: launchers on 2 ranks, DeepSpeed, kill and resume
#   faults     hundreds of kills, damages and signals, with a table of what they did: about half an hour
#   gpu        tests that need a GPU; without one, each says why it could not run
#   browser    the chat page in headless Chromium (chromium on PATH); installs playwright
#   extras     tests of Ray, Sudachi, Megatron-LM, GGUF, fp8, a notebook and xlsum; installs these extras of
#              pyproject.toml. Also of transformers 4, which goes into a folder of its own
#   all        everything; installs all these
#
# RECIPE_PYTHON=python3 uses that Python as it is, see setup.sh: nothing is installed, missing packages are named.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' tests/run.sh; exit ;; esac
extras=(tests lint)
parallel=()
case ${1:-} in
  lint) marker=none ;;
  slow | faults | gpu) marker=$1 ;;
  browser) marker=$1 extras+=(browser) ;;
  extras) marker="extra and not slow and not browser" extras+=(ray sudachi megatron gguf notebook japanese torchao) ;;
  all) marker="slow or not slow" extras+=(ray sudachi megatron gguf notebook japanese torchao browser) ;;
  *)
    marker="not slow and not faults and not gpu and not browser and not extra"
    # A process per core, each with one thread: most time goes into starting Python. Two processes with two
    # threads each would wait for one another.
    parallel=(-n logical --maxprocesses 4 --dist loadfile)
    export OMP_NUM_THREADS=1
    ;;
esac
case ${1:-} in lint | slow | faults | gpu | browser | extras | all) shift ;; esac

python=$(bash setup.sh --python --extra "${extras[@]}")
export PYTHONPATH=$PWD/pretrain${PYTHONPATH:+:$PYTHONPATH}
PATH=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH
shellcheck ./*.sh pretrain/*.sh fine-tuning/*.sh tests/*.sh .ci/run
"$python" -m ruff check .
"$python" -m ruff format --check .
[[ $marker == none ]] || "$python" -m pytest -m "$marker" "${parallel[@]}" "$@"
