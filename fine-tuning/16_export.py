"""Stage 16: collect the model in one folder: weights, tokenizer and card; upload it to the hub if asked to.

Edit: push_to_hub (off by default), hub_model_id and hub_private_repo in configs/<recipe>/finetune.json, or in
pretrain.json for a recipe without tuning. Writes: a model folder with README.md.
Run:  python fine-tuning/16_export.py --recipe tiny
"""

from recipe.config.training import tuned_stage
from recipe.conversations.instructions import no_pairs
from recipe.project import write_text
from recipe.run.freshness import hub
from recipe.run.stage import Stage, run_stage

PRETRAINED = ("01_download", "02_dataset", "03_tokenizer", "05_pretrain", "06_evaluate", "07_generate")


def last_model(config: dict) -> str:
    """The last stage that trains; it made the model."""
    return "05_pretrain" if no_pairs(config) else tuned_stage(config)


def inputs(config: dict) -> tuple[str, ...]:
    """The stages that the card describes."""
    tuned = () if no_pairs(config) else ("11_dataset", "12_finetune", "14_evaluate", "15_generate")
    return tuple(sorted({*PRETRAINED, *tuned, last_model(config)}))


def main(stage: Stage) -> None:
    """Collect the files of the model, write the card, upload if asked to."""
    from recipe.export.card import copy_curves, copy_model, model_card, push

    target, source = hub(stage.config), stage.inputs[last_model(stage.config)]
    copy_model(source, stage.folder)
    copy_curves(stage.inputs, stage.folder)
    repository = target["repository"]
    card = model_card(repository or stage.recipe, repository or "", stage.config, stage.inputs)
    write_text(stage.folder / "README.md", card)
    size = sum(path.stat().st_size for path in stage.folder.iterdir())
    stage.headline = f"{size / 1e6:,.1f} MB to take away, card included"
    stage.figures = {"bytes": size, "from": last_model(stage.config)}
    if repository:
        stage.figures["commit_url"] = push(stage.folder, repository, target["private"])
        stage.headline += f"; pushed: {stage.figures['commit_url']}"


if __name__ == "__main__":
    run_stage(__file__, __doc__, main, (), inputs)
