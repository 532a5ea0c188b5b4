"""Tasks of lm-evaluation-harness: a YAML file for each, their items, and the model that answers.

The YAML files of this folder hold prompts, number of shots and metrics of our own tasks, and say in their
``metadata`` what each needs (`recipe.config.tasks`). Their items are JSON Lines that
`recipe.evaluation.tasks.items` writes. Tasks that come with the harness need no file here.
"""
