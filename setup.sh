#!/usr/bin/env bash
# Make .venv, install what requirements.txt pins, check the result. Safe to run again: done work is skipped.
#
# Usage: bash setup.sh [--python]      --python: set up quietly if needed, then print the path of the python
#
# VENV=DIR               put the environment there instead of .venv (the Dockerfile uses /opt/venv)
# PYTHON=python3.12      the interpreter to build it from
# TORCH_CPU_INDEX=URL    on a host without a GPU: the index that serves CPU builds of torch
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${VENV:-$here/.venv}
stamp=$venv/.recipe-ready
wanted=$(cat "$here/requirements.txt" "$here/pyproject.toml" "$here/setup.sh" | cksum)

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# The compute capability of the first GPU as digits (80 for 8.0), nothing without one.
capability() {
  command -v nvidia-smi >/dev/null || return 0
  nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -cd '0-9' || true
}

# A GPU that appears later (a container built without one) changes what is to be installed.
wanted="$wanted $here gpu=$(capability)"
ready() { [[ -x $venv/bin/python && -f $stamp && $(cat "$stamp") == "$wanted" ]]; }

install() {
  local python=${PYTHON:-python3} gpu
  command -v "$python" >/dev/null || die "no $python. Install Python 3.11 or newer (apt-get install python3 python3-venv python3-dev)"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$("$python" --version) is too old: 3.11 or newer is wanted. Set PYTHON=python3.12, for example"
  "$python" -c 'import venv, ensurepip' 2>/dev/null || die "$python has no venv module: apt-get install python3-venv"
  command -v g++ >/dev/null || die "no g++, which torch.compile and neologdn need: apt-get install g++"
  [[ -f $("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h ]] ||
    die "no Python headers, which torch.compile and neologdn need: apt-get install python3-dev"

  say "makes $venv with $("$python" --version) (a few minutes the first time)"
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv"
  local pip=("$venv/bin/python" -m pip --disable-pip-version-check install -qq --retries 5)
  gpu=$(capability)
  if [[ -z $gpu && -n ${TORCH_CPU_INDEX:-} ]]; then
    say "no NVIDIA GPU: takes torch from TORCH_CPU_INDEX"
    "${pip[@]}" --index-url "$TORCH_CPU_INDEX" "$(grep '^torch==' "$here/requirements.txt")"
  fi
  "${pip[@]}" -r "$here/requirements.txt"
  "${pip[@]}" --no-deps --no-build-isolation -e "$here"
  install_flash_attention "$gpu"
  check
  printf '%s' "$wanted" >"$stamp"
}

install_flash_attention() {
  local gpu=$1
  if [[ -z $gpu ]]; then
    say "flash-attn: not installed, no NVIDIA GPU found"
  elif ((gpu < 80)); then
    say "flash-attn: not installed, it needs compute capability 8.0 and this GPU has ${gpu%?}.${gpu: -1}; SDPA instead"
  elif ! command -v nvcc >/dev/null; then
    say "flash-attn: not installed, no CUDA toolkit (nvcc) to build it with; SDPA instead"
  elif MAX_JOBS=${MAX_JOBS:-4} "$venv/bin/python" -m pip install --quiet --no-build-isolation "flash-attn>=2.8,<3"; then
    say "flash-attn: installed, for compute capability ${gpu%?}.${gpu: -1}"
  else
    say "flash-attn: its build failed (see above); attention will be PyTorch's SDPA"
  fi
}

check() {
  "$venv/bin/python" - <<'PY' >&2
import accelerate, datasets, lxml, neologdn, sentencepiece, tokenizers, torch, transformers
import recipe
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
print(f"setup: torch {torch.__version__} on {device}, transformers {transformers.__version__}: ready")
PY
}

ready || install
if [[ ${1:-} == --python ]]; then printf '%s\n' "$venv/bin/python"; fi
