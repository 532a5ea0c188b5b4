#!/usr/bin/env bash
# What only a GPU can show, without network, in two parts of at most 5 and 9 minutes: first the tests and the
# preflight's memory, several at a time, because their time does not matter; then the timings, one at a time.
#
# Usage: bash tests/bench/gpu.sh [--tiny] [checks|timings] [FOLDER]
#   --tiny   rehearse: the smallest sizes, a CPU is enough
#   checks, timings   one part only; both by default
#   FOLDER   for logs and summary.md; outputs/gpu by default
#
# RECIPE_PYTHON=python3 uses that Python as it is, see setup.sh: so on a host without network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
case ${1:-} in -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' tests/bench/gpu.sh; exit ;; esac
tiny=() part=all of_loss=(16384 1024 50000) of_preflight=()
[[ ${1:-} != --tiny ]] || { tiny=(--tiny) of_loss=(64 16 1000) of_preflight=("6M one block"); shift; }
case ${1:-} in checks | timings) part=$1; shift ;; esac
folder=${1:-outputs/gpu}
mkdir -p "$folder"
python=$(bash setup.sh --python --extra tests)
PYTHONPATH=$PWD/pretrain${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH RECIPE_PYTHON=$python

# job NAME SECONDS COMMAND...: run it until the part's end at the latest. FOLDER/NAME.log has its output, and
# summary.md its tables and lines, also of a job that was cut off.
job() {
  local begin=$SECONDS code=0 left=$((ends - SECONDS))
  timeout -k 10 "$(($2 < left ? $2 : left > 1 ? left : 1))" "${@:3}" >"$folder/$1.log" 2>&1 || code=$?
  {
    printf '\n%s: exit %s, %s s\n\n' "$1" "$code" "$((SECONDS - begin))"
    grep -E "^\||tokens a step|tokens planned|positions x|^GPU:|^idle|^Muon|^(FAILED|ERROR|SKIPPED)|(passed|failed|skipped).* in " \
      "$folder/$1.log" || echo "$1: nothing to show"
  } | tee -a "$folder/summary.md"
}
bench() { job "$1" "$2" "$python" tests/bench/gpu.py ${tiny[@]+"${tiny[@]}"} "$1"; }

[[ $part == timings ]] || : >"$folder/summary.md"
if [[ $part != timings ]]; then
  ends=$((SECONDS + 260))
  job tests 260 "$python" -m pytest -n logical --maxprocesses 8 --timeout 200 -v -rA -m gpu tests/stages/test_gpu.py &
  job preflight 260 "$python" tests/bench/preflight.py ${of_preflight[@]+"${of_preflight[@]}"} &
  wait
fi
if [[ $part != checks ]]; then
  ends=$((SECONDS + 520))
  # In the order of their value: the last ones have what is left.
  bench training 240
  bench documents 180
  bench small 150
  job loss 90 "$python" tests/bench/loss.py "${of_loss[@]}"
  bench fp8 120
  bench muon 60
  bench attention 200
fi
