#!/usr/bin/env bash
# Stage 05: train the model from scratch: plain python, torchrun (--nproc N) or deepspeed (--deepspeed zero2).
#
# Edit: configs/<recipe>/model.json, pretrain.json. Writes: checkpoints/, a plain Hugging Face folder, metrics.jsonl.
# Run:  bash pretrain/05_pretrain.sh --recipe tiny
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$(bash "$here/../setup.sh" --python)
exec "$python" -m recipe.launch "$here/run_clm.py" "$@"
