#!/usr/bin/env bash
# Train over the nodes of a Slurm job: one launcher a node, which starts the ranks of that node.
#
# Run from the project's folder, which all nodes must see, with the stage's script and its options:
#   sbatch --nodes 2 --gpus-per-node 8 pretrain/slurm.sh pretrain/05_pretrain.sh --recipe mistral-300m --fsdp
#
# Five minutes before the time limit the training saves a checkpoint, and the job is queued again to continue.
#SBATCH --job-name=recipe
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=B:USR1@300
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?this script is for sbatch, from the folder of the project}"
stage=${1:?wanted the script of a stage: pretrain/05_pretrain.sh or fine-tuning/12_finetune.sh}
shift
recipe=tiny
for ((i = 1; i < $#; i++)); do
  if [[ ${!i} == --recipe ]]; then next=$((i + 1)) recipe=${!next}; fi
done
for option; do
  if [[ $option == --recipe=* ]]; then recipe=${option#*=}; fi
done
bash setup.sh --python >/dev/null # once, before all nodes want it at the same time

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# The number of the node is known on the node only; a port of its own lets two jobs share one.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
  bash -c 'exec bash "$0" "$@" --node-rank "$SLURM_NODEID"' "$stage" --nnodes "$SLURM_JOB_NUM_NODES" \
  --master-addr "$head" --master-port $((20000 + SLURM_JOB_ID % 10000)) "$@" &
training=$!

near_the_limit=false
trap 'near_the_limit=true; touch "outputs/$recipe/.$(basename "$stage" .sh).work/stop" || true' USR1
code=0
wait "$training" || code=$?
if $near_the_limit; then # the signal has ended `wait`, not the training
  code=0
  wait "$training" || code=$?
  if ((code)); then scontrol requeue "$SLURM_JOB_ID"; fi
fi
exit "$code"
