#!/usr/bin/env bash
# Stage 12: fine-tune the model on instructions.
#
# It starts plain python, torchrun (--nproc N) or deepspeed (--deepspeed zero2).
# Edit: configs/<recipe>/finetune.json. Writes: the same as stage 05, with the chat template in the tokenizer.
# Run:  bash fine-tuning/12_finetune.sh --recipe tiny
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$(bash "$here/../setup.sh" --python)
export PYTHONPATH=$here/../pretrain${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m recipe.run.launch "$here/run_sft.py" "$@"
