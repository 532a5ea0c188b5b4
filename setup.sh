#!/usr/bin/env bash
# Make .venv, install the pinned packages and check the result. Safe to run again: finished work is skipped.
#
# Usage: bash setup.sh [--python] [--extra NAME...]
#   --python           print the path of the Python interpreter at the end
#   --extra NAME...    also install these extras of pyproject.toml, for example: --extra ray sudachi
#
# Environment variables:
#   RECIPE_PYTHON=python3   use this Python and its packages as they are (a container with torch, Colab): nothing is
#                           installed; what is missing is named, with the command that installs it. For a Python
#                           script that you start yourself: export PYTHONPATH=pretrain
#   VENV=DIR                put the environment there instead of .venv (the Dockerfile uses /opt/venv)
#   PYTHON=python3.12       the interpreter that .venv is made from
#   TORCH_CPU_INDEX=URL     without a GPU: take torch from this index of CPU builds instead of PyTorch's own; where it
#                           does not answer, or if URL is empty, pip takes the CUDA build (2.7 GB of libraries)
#   FLASH_ATTN=build        with a GPU: compile flash-attn if no ready wheel fits (needs nvcc; up to an hour)
#
# Exit codes: 0 ready, 1 the installation failed, 2 refused (wrong option, RECIPE_PYTHON cannot be used).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${VENV:-$here/.venv}
stamp=$venv/.recipe-ready
# Another major version of these changes results or breaks the scripts.
same_major="accelerate datasets deepspeed lm-eval neologdn numpy peft sentencepiece tokenizers torch transformers trl"
# An environment may lack them: only the page of chat.py imports them, and an older huggingface_hub brings httpx.
seldom="gradio httpx2 starlette"

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }
refuse() { say "error: $*"; exit 2; }

# The compute capability of the first GPU as digits (80 for 8.0); nothing without a GPU.
capability() {
  command -v nvidia-smi >/dev/null || return 0
  nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -cd '0-9' || true
}

# packages PYTHON COMMAND [EXTRA...]: read the pins of requirements.txt, or of the extras if there are any.
#   pins   print them, one a line; exit 2 for an unknown extra
#   check  compare them with what is installed, without importing it; print what is wrong in one line and exit 3
packages() {
  SAME_MAJOR=$same_major SELDOM=$seldom "$1" - "$here" "${@:2}" <<'PY'
import os, platform, sys, tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

here, command, *extras = sys.argv[1:]
known = tomllib.loads(Path(here, "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
if unknown := [name for name in extras if name not in known]:
    print(f"unknown extra {unknown[0]!r}. Known: {', '.join(known)}")
    sys.exit(2)
if extras:
    pins = [pin for name in extras for pin in known[name]]
else:
    lines = Path(here, "requirements.txt").read_text("utf-8").splitlines()
    lines = [line.partition(";") for line in lines if line and not line.startswith("#")]
    # The only marker in use: platform_machine == "...".
    pins = [pin for pin, _, marker in lines if not marker or f'"{platform.machine()}"' in marker]
if command == "pins":
    print("\n".join(pins))
    sys.exit()

missing, faults, install = [], [], []
for pin in pins:
    name, expected = pin.split("==")
    major = expected.split(".")[0]
    try:
        found = version(name)
    except PackageNotFoundError:
        if name in os.environ["SELDOM"].split():
            continue
        missing.append(name)
    else:
        if name not in os.environ["SAME_MAJOR"].split() or found.split(".")[0] == major:
            continue
        faults.append(f"{name} is {found}, expected {major}.*")
    install.append(pin)
if missing:
    rest = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    faults.append(f"not installed: {', '.join(missing[:5])}{rest}")
if faults:
    whole = any(pin.startswith("torch==") for pin in install)
    what = f"-r {here}/requirements.txt" if whole else " ".join(install)
    print(f"{'; '.join(faults)}. Install: {sys.executable} -m pip install {what}")
    sys.exit(3)
PY
}

# Check the environment that RECIPE_PYTHON names and set `python`.
use_as_it_is() {
  local fault
  python=$(command -v "$RECIPE_PYTHON") ||
    refuse "RECIPE_PYTHON=$RECIPE_PYTHON: not found. Name a Python of 3.11 or newer, or unset it: setup.sh then makes .venv"
  [[ $python == /* ]] || python=$PWD/$python
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    refuse "RECIPE_PYTHON=$RECIPE_PYTHON is $("$python" --version 2>&1), expected Python 3.11 or newer"
  fault=$(packages "$python" check) || refuse "RECIPE_PYTHON=$RECIPE_PYTHON: $fault"
  ((${#extras[@]} == 0)) || fault=$(packages "$python" check "${extras[@]}") ||
    refuse "RECIPE_PYTHON=$RECIPE_PYTHON: $fault"
}

# A GPU that appears later (an environment made without one) changes what is installed; after another version of
# the system's Python, nothing of the old one is found.
expected() {
  printf '%s %s gpu=%s %s' "$(cat "$here"/{requirements.txt,pyproject.toml,setup.sh} | cksum)" "$here" \
    "$(capability)" "$("$venv/bin/python" -V 2>&1)"
}
# Whether the environment has the Python that PYTHON asks for.
asked_for() { [[ -z ${PYTHON:-} || $("$venv/bin/python" -V 2>&1) == "$("$PYTHON" -V 2>&1)" ]]; }
ready() { [[ -x $venv/bin/python && -f $stamp && $(cat "$stamp") == "$(expected)" ]] && asked_for; }

install() {
  local base=${PYTHON:-python3} gpu pins site
  command -v "$base" >/dev/null ||
    die "$base: not found. Install Python 3.11 or newer (apt-get install python3 python3-venv python3-dev)"
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$base is $("$base" --version 2>&1), expected Python 3.11 or newer: set PYTHON=python3.12, for example"
  "$base" -c 'import venv, ensurepip' 2>/dev/null || die "$base has no module venv: apt-get install python3-venv"
  command -v g++ >/dev/null || die "g++ not found; torch.compile and neologdn need it: apt-get install g++"
  [[ -f $("$base" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h ]] ||
    die "Python.h not found; torch.compile and neologdn need it: apt-get install python3-dev"

  rm -f "$stamp"
  say "makes $venv with $("$base" --version) (a few minutes the first time)"
  { "$venv/bin/python" -m pip --version >/dev/null 2>&1 && asked_for; } || "$base" -m venv --clear "$venv"
  gpu=$(capability)
  local torch cpu_index=${TORCH_CPU_INDEX-https://download.pytorch.org/whl/cpu}
  torch=$(grep '^torch==' "$here/requirements.txt")
  if [[ -n $gpu ]]; then
    # pip would keep the CPU build of a set-up without a GPU.
    [[ $("$venv/bin/python" -m pip show torch 2>/dev/null) != *+cpu* ]] ||
      "$venv/bin/python" -m pip uninstall -qq -y torch
  elif [[ -n $cpu_index ]]; then
    say "no NVIDIA GPU: takes the CPU build of torch"
    pip_install --index-url "$cpu_index" --retries 2 --timeout 20 --no-deps "$torch" ||
      say "$cpu_index: no answer, so torch comes with its CUDA libraries"
  fi
  mapfile -t pins < <(packages "$venv/bin/python" pins tests lint)
  pip_install -r "$here/requirements.txt" "${pins[@]}"
  # The scripts of fine-tuning/ find the package recipe by it.
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  printf '%s\n' "$here/pretrain" >"$site/recipe.pth"
  install_flash_attention "$gpu"
  import_all
  expected >"$stamp"
}

pip_install() { "$venv/bin/python" -m pip --disable-pip-version-check install -qq --retries 5 "$@"; }

has_flash_attention() { "$venv/bin/python" -c 'import flash_attn' 2>/dev/null; }

install_flash_attention() {
  # Nothing is lost without it: PyTorch 2.11 and newer carry FlashAttention's kernels (attention `varlen`).
  local gpu=$1 instead="the FlashAttention in PyTorch itself is used instead"
  local package=(-c "$here/requirements.txt" "flash-attn>=2.8,<3")
  if [[ -z $gpu ]]; then
    say "flash-attn: not installed, no NVIDIA GPU found"
    return
  elif ((gpu < 80)); then
    say "flash-attn: not installed, it needs compute capability 8.0 and this GPU has ${gpu%?}.${gpu: -1}; PyTorch's SDPA is used instead"
    return
  elif has_flash_attention; then
    return
  fi
  "$venv/bin/python" -m pip uninstall -qq -y flash-attn 2>/dev/null # one for another torch
  if pip_install --only-binary flash-attn "${package[@]}" 2>/dev/null && has_flash_attention; then
    say "flash-attn: installed from a ready wheel, for compute capability ${gpu%?}.${gpu: -1}"
    return
  fi
  "$venv/bin/python" -m pip uninstall -qq -y flash-attn 2>/dev/null
  if [[ ${FLASH_ATTN:-} != build ]]; then
    say "flash-attn: not installed, no ready wheel fits (FLASH_ATTN=build compiles it); $instead"
  elif ! command -v nvcc >/dev/null; then
    say "flash-attn: not installed, nvcc of the CUDA toolkit not found; $instead"
  elif pip_install setuptools wheel &&
    MAX_JOBS=${MAX_JOBS:-4} pip_install --no-build-isolation --no-binary flash-attn "${package[@]}"; then
    say "flash-attn: compiled for compute capability ${gpu%?}.${gpu: -1}"
  else
    say "flash-attn: compiling failed (see above); $instead"
  fi
}

import_all() {
  "$venv/bin/python" - <<'PY' >&2
import accelerate, datasets, lxml, neologdn, sentencepiece, tokenizers, torch, transformers
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
print(f"setup: torch {torch.__version__} on {device}, transformers {transformers.__version__}: ready")
PY
}

install_extras() {
  local answer pins code=0
  answer=$(packages "$python" check "${extras[@]}") || code=$?
  ((code != 2)) || refuse "--extra: $answer"
  ((code)) || return 0
  say "installs: ${extras[*]}"
  mapfile -t pins < <(packages "$python" pins "${extras[@]}")
  pip_install -c "$here/requirements.txt" "${pins[@]}"
}

print=false extras=()
while (($#)); do
  case $1 in
    --python) print=true ;;
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$here/setup.sh"; exit ;;
    --extra)
      while (($# > 1)) && [[ $2 != -* ]]; do extras+=("$2"); shift; done
      ((${#extras[@]})) || refuse "--extra: expected the names of extras of pyproject.toml, for example: --extra ray" ;;
    *) refuse "unknown option $1. Usage: bash setup.sh [--python] [--extra NAME...]" ;;
  esac
  shift
done

# torch.compile does not quote the paths of what it compiles.
for path in "$here" "$venv"; do
  [[ ! $path =~ [[:space:]\'\"] ]] ||
    refuse "torch.compile cannot use a path with a space or a quote: $path. Move the project (or VENV) to another path"
done

if [[ -n ${RECIPE_PYTHON:-} ]]; then
  use_as_it_is
else
  if ! ready; then
    install
  elif [[ ${FLASH_ATTN:-} == build ]]; then
    install_flash_attention "$(capability)"
  fi
  python=$venv/bin/python
  ((${#extras[@]} == 0)) || install_extras
fi
if $print; then printf '%s\n' "$python"; fi
