#!/usr/bin/env bash
# Stage 05: train the model, from scratch or a published checkpoint: plain python, torchrun (--nproc N) or deepspeed
# (--deepspeed zero2).
#
# Several GPUs: one rank each by itself. Weights that do not fit: --deepspeed zero3, --fsdp, --tensor-parallel N.
# Several nodes: --nnodes, --node-rank and --master-addr on each, or --deepspeed with --hostfile; slurm.sh.
# Edit: configs/<recipe>/model.json, pretrain.json. Writes: checkpoints/, a plain Hugging Face folder, metrics.jsonl.
# Run:  bash pretrain/05_pretrain.sh --recipe tiny
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$(bash "$here/../setup.sh" --python)
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m recipe.run.launch "$here/run_clm.py" "$@"
