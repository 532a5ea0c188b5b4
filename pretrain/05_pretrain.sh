#!/usr/bin/env bash
# Stage 05: pretrain the model, from scratch or from a published checkpoint.
#
# It starts plain python, torchrun (--nproc N) or deepspeed (--deepspeed zero2). With several GPUs, each gets a rank by
# default. When the model does not fit into one GPU: --deepspeed zero3, --fsdp or --tensor-parallel N.
# With several nodes: --nnodes, --node-rank and --master-addr on each node, or --deepspeed with --hostfile, or slurm.sh.
# Edit: configs/<recipe>/model.json, pretrain.json. Writes: checkpoints/, a plain Hugging Face folder, metrics.jsonl, metrics.md.
# Run:  bash pretrain/05_pretrain.sh --recipe tiny
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$(bash "$here/../setup.sh" --python)
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m recipe.run.launch "$here/run_clm.py" "$@"
