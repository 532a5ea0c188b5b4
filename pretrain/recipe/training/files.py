"""The names of what is in the folder of a training, for all that write or read it; nothing is imported."""

METRICS = "metrics.jsonl"  # a row for each log and each evaluation
CHECKPOINTS = "checkpoints"  # a folder for each checkpoint, `checkpoint-<step>`
RANKS = "ranks"  # the signs of life of each rank, which the launcher watches
STOP = "stop"  # while it exists, every rank saves a checkpoint and ends
