#!/usr/bin/env bash
# Train on the nodes of a Slurm job: one launcher per node, which starts the ranks of that node.
#
# Run it in the project's folder, which all nodes must share, with the stage's script and its options:
#   sbatch --nodes 2 --gpus-per-node 8 pretrain/slurm.sh pretrain/05_pretrain.sh --recipe mistral-300m --fsdp
#
# Five minutes before the time limit the training saves a checkpoint, and the job is queued again to continue it. After
# the loss of a node Slurm queues it again, too.
#SBATCH --job-name=recipe
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?run this script with sbatch, in the folder of the project}"
stage=${1:?the script of a stage is missing: pretrain/05_pretrain.sh or fine-tuning/12_finetune.sh}
shift
recipe=tiny
for ((i = 1; i < $#; i++)); do
  if [[ ${!i} == --recipe ]]; then next=$((i + 1)) recipe=${!next}; fi
done
for option; do
  if [[ $option == --recipe=* ]]; then recipe=${option#*=}; fi
done
# A job that is queued again continues: --force would start over each time.
options=()
for option; do
  if [[ $option != --force || ${SLURM_RESTART_COUNT:-0} == 0 ]]; then options+=("$option"); fi
done
# Set up once, before all nodes do it at the same time.
bash setup.sh --python >/dev/null

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Only the node knows its number. A port per job lets two jobs share a node.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
  bash -c 'exec bash "$0" "$@" --node-rank "$SLURM_NODEID"' "$stage" --nnodes "$SLURM_JOB_NUM_NODES" \
  --master-addr "$head" --master-port $((20000 + SLURM_JOB_ID % 10000)) "${options[@]}" &
training=$!

near_the_limit=false
trap 'near_the_limit=true; touch "outputs/$recipe/.$(basename "$stage" .sh).work/stop" || true' USR1
code=0
wait "$training" || code=$?
# The signal has ended `wait`, not the training.
if $near_the_limit; then
  code=0
  wait "$training" || code=$?
  if ((code)); then scontrol requeue "$SLURM_JOB_ID"; fi
fi
exit "$code"
