#!/usr/bin/env bash
# Stage 13: train the tuned model on preferences (DPO) or by rewards (GRPO); skipped without preference.json.
#
# Edit: configs/<recipe>/preference.json. Writes: the same as stage 12.
# Run:  bash fine-tuning/13_preference.sh --recipe tiny
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$(bash "$here/../setup.sh" --python)
export PYTHONPATH=$here/../pretrain${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m recipe.run.launch "$here/run_dpo.py" "$@"
