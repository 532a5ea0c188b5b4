#!/usr/bin/env bash
# Set up if needed, then check shell and Python style and run the tests.
#
# Usage: bash tests/run.sh [slow|gpu|browser|all] [PYTEST OPTION]...
#   (nothing)  the default tests, under 15 minutes on 2 cores
#   slow       the marked slow tests: launchers on 2 ranks, DeepSpeed, kill and resume
#   gpu        the checks that need a GPU; without one, each says why it could not run
#   browser    the chat page in headless Chromium (chromium on PATH, pip install playwright)
#   all        everything
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in
  slow | gpu | browser) marker=$1; shift ;;
  all) marker="slow or not slow"; shift ;;
  *) marker="not slow and not gpu and not browser" ;;
esac
python=$(bash setup.sh --python)
"$(dirname "$python")/shellcheck" ./*.sh pretrain/*.sh fine-tuning/*.sh tests/*.sh .ci/run
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m pytest -m "$marker" "$@"
