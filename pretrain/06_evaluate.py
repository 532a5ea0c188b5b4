"""Stage 06: measure the model: loss, perplexity, bits per byte and per character, in and out of domain;
tasks.

Edit: configs/<recipe>/evaluation.json. Writes: metrics.json, metrics.md, tasks/ (what was asked).
Run:  python pretrain/06_evaluate.py --recipe tiny
"""

import shutil
from typing import Any

from recipe.config.evaluation import PACKAGED_TASKS
from recipe.corpus.download import require_data
from recipe.corpus.shards import read_texts, side_sources
from recipe.project import DATA, read_json, write_json
from recipe.run.stage import Stage, run_stage


def main(stage: Stage) -> None:
    """Evaluate every source's validation side; sources held out whole are the out-of-domain set.

    Then tasks.
    """
    from recipe.evaluation.metrics import WINDOW_RULE, combine, computes_in_bf16, evaluate_texts, markdown
    from recipe.evaluation.tasks.harness import markdown as score_table
    from recipe.model.build import for_inference, load_model
    from transformers import AutoTokenizer

    config, dataset = stage.config["evaluation"], stage.inputs["02_dataset"]
    tokenizer = AutoTokenizer.from_pretrained(stage.inputs["05_pretrain"])
    model = for_inference(load_model(stage.inputs["05_pretrain"]))
    most = int(config.get("megabytes_per_source", 1) * 1e6)
    batch_size = config.get("batch_size", 8)
    block_size = stage.config["pretrain"]["block_size"]
    bf16 = computes_in_bf16(stage.config["pretrain"])
    sources = {}
    for name in side_sources(dataset, "valid"):
        texts = list(read_texts(dataset, "valid", name, most))
        if texts:
            sources[name] = evaluate_texts(
                model, tokenizer, texts, block_size, batch_size, stage.folder, name, bf16
            )
    held_out = {name for name, spec in stage.config["dataset"]["sources"].items() if spec.get("held_out")}
    inside = [figures for name, figures in sources.items() if name not in held_out]
    outside = [figures for name, figures in sources.items() if name in held_out]
    metrics = {"in_domain": combine(inside)} | ({"out_of_domain": combine(outside)} if outside else {})
    text = f"{markdown(metrics | sources)}\n{WINDOW_RULE.format(block_size=block_size)}\n"
    stage.figures = metrics | {"sources": sources, "precision": "bf16" if bf16 else "fp32"}
    if config.get("tasks"):
        stage.figures["tasks"] = score_tasks(stage, model, tokenizer, batch_size, bf16)
        text += "\n" + score_table({"score": stage.figures["tasks"]})
    write_json(stage.folder / "metrics.json", stage.figures)
    (stage.folder / "metrics.md").write_text(text, "utf-8")
    shown = [f"{name.replace('_', ' ')} {figures['bits_per_byte']:.4f}" for name, figures in metrics.items()]
    stage.headline = "bits per byte: " + ", ".join(shown)


def score_tasks(stage: Stage, model: Any, tokenizer: Any, batch_size: int, bf16: bool) -> dict[str, Any]:
    """The scores of the tasks of evaluation.json."""
    from recipe.evaluation.tasks.harness import Harness, run_tasks, scores
    from recipe.evaluation.tasks.items import write_tasks

    if "01_download" in stage.inputs:
        record = read_json(stage.inputs["01_download"] / "stage.json")
        require_data(record["figures"], stage.config["dataset"], DATA)
    names = stage.config["evaluation"]["tasks"]
    folder = stage.folder / "tasks"
    tasks = write_tasks(stage.config, stage.inputs["02_dataset"], folder, names)
    asked = Harness(model, tokenizer, batch_size, bf16)
    results = {name: scores(samples) for name, samples in run_tasks(asked, tasks).items()}
    shutil.rmtree(folder / ".cache")
    stage.say(f"tasks: {asked.cut:,} prompts were cut: longer than the model's positions")
    return results


def inputs(config: dict[str, Any]) -> tuple[str, ...]:
    """The data of stage 01 as well, where a task asks about it."""
    packaged = PACKAGED_TASKS.keys() & config["evaluation"].get("tasks", {}).keys()
    return (*(["01_download"] if packaged else []), "02_dataset", "05_pretrain")


if __name__ == "__main__":
    run_stage(__file__, __doc__, main, ("evaluation",), inputs)
