"""Tasks of lm-evaluation-harness: a YAML file each, the items behind them, and the model as the harness asks
it.

Every task reads its items from JSON Lines that `recipe.evaluation.tasks.items` writes, in the text
that the model was trained on. The prompts, the number of shots and the metrics stand in
the YAML files of this folder.
"""
