#!/usr/bin/env bash
# What only a GPU can show, within ten minutes and without network: first the tests and the preflight's memory, several
# at a time, because their time does not matter; then the timings, one at a time.
#
# Usage: bash tests/bench/gpu.sh [--tiny] [FOLDER]
#   --tiny   rehearse: the smallest sizes, a CPU is enough
#   FOLDER   for logs and summary.md; outputs/gpu by default
#
# RECIPE_PYTHON=python3 uses that Python as it is, see setup.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
case ${1:-} in -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' tests/bench/gpu.sh; exit ;; esac
tiny=()
[[ ${1:-} != --tiny ]] || { tiny=(--tiny); shift; }
folder=${1:-outputs/gpu}
mkdir -p "$folder"
python=$(bash setup.sh --python --extra tests)
PYTHONPATH=$PWD/pretrain${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH RECIPE_PYTHON=$python
started=$SECONDS

# job NAME SECONDS COMMAND...: run it with a time limit; its output goes to FOLDER/NAME.log.
job() {
  local begin=$SECONDS code=0
  timeout -k 10 "$2" "${@:3}" >"$folder/$1.log" 2>&1 || code=$?
  echo "$1: exit $code, $((SECONDS - begin)) s" | tee -a "$folder/summary.md"
}

: >"$folder/summary.md"
tests=("$python" -m pytest -q -rs -m gpu tests/stages/test_gpu.py)
for group in "setting_is_active or fp8" "8_bit or qlora" "signal or chunks" "talking or probe"; do
  job "tests ${group%% *}" 240 "${tests[@]}" -k "$group" &
done
job preflight 240 "$python" tests/bench/preflight.py ${tiny[@]+"6M one block"} &
wait
# These need the GPU for themselves.
job training 150 "$python" tests/bench/gpu.py ${tiny[@]+"${tiny[@]}"} training
job small 150 "$python" tests/bench/gpu.py ${tiny[@]+"${tiny[@]}"} small
job idle 75 "$python" tests/bench/gpu.py ${tiny[@]+"${tiny[@]}"} idle
job loss 30 "$python" tests/bench/loss.py ${tiny[@]+64 16 1000}
# What is left of the ten minutes.
job documents $((590 - SECONDS + started > 30 ? 590 - SECONDS + started : 30)) \
  "$python" tests/bench/gpu.py ${tiny[@]+"${tiny[@]}"} documents fp8 attention
for name in preflight training small idle loss documents; do
  { echo; grep -hE '^\||^idle|^small|tokens a step' "$folder/$name.log" || echo "$name: no table"; } >>"$folder/summary.md"
done
for log in "$folder"/tests*.log; do tail -n 1 "$log"; done >>"$folder/summary.md"
cat "$folder/summary.md"
