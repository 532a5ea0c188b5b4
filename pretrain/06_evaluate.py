"""Stage 06: measure the model: loss, perplexity, bits per byte and per character, and scores of tasks.

Edit: configs/<recipe>/evaluation.json. Writes: metrics.json, metrics.md, tasks/ (what was asked).
Run:  python pretrain/06_evaluate.py --recipe tiny
"""

import shutil
from collections import Counter
from typing import Any

from recipe.config.dataset import held_out_sources
from recipe.config.tasks import reads_sources, tasks_of
from recipe.corpus.shards import read_texts, side_sources
from recipe.evaluation.tasks.available import check_available, left_out_line, skipped_list
from recipe.project import read_record, write_json, write_text
from recipe.run.stage import Stage, require_downloads, run_stage

NAME = "06_evaluate"


def main(stage: Stage) -> None:
    """Evaluate the validation side of every source, then ask the tasks."""
    skipped = check_available(stage.config)
    from recipe.evaluation.metrics import WINDOW_RULE, computes_in_bf16, losses_table
    from recipe.model.build import for_inference, load_model
    from recipe.tokenization.save import load_tokenizer

    not_asked: Counter[str] = Counter()
    tasks = loaded_tasks(stage, skipped, not_asked) if tasks_of(stage.config, NAME) else None
    tokenizer = load_tokenizer(stage.inputs["05_pretrain"])
    model = for_inference(load_model(stage.inputs["05_pretrain"]))
    bf16 = computes_in_bf16(stage.config["pretrain"])

    block_size, *others = block_sizes(stage)
    sources = evaluate_sources(stage, model, tokenizer, bf16, block_size)
    domains = combine_domains(stage.config, sources)
    text = f"{losses_table(domains | sources)}\n{WINDOW_RULE.format(block_size=block_size)}\n"
    stage.figures = domains | {"sources": sources, "precision": "bf16" if bf16 else "fp32"}
    if others:
        lengths = {str(block_size): domains}
        for other in others:
            found = evaluate_sources(stage, model, tokenizer, bf16, other)
            lengths[str(other)] = combine_domains(stage.config, found)
        stage.figures["lengths"] = lengths
        rows = {
            f"{name.replace('_', ' ')}, blocks of {int(length):,}": figures
            for length, found in lengths.items()
            for name, figures in found.items()
        }
        text += f"\nThe same texts in blocks of other lengths:\n\n{losses_table(rows)}"
    if tasks:
        stage.figures["tasks"], table = score_tasks(stage, model, tokenizer, tasks, bf16)
        stage.figures |= {"skipped_tasks": skipped, "not_asked": dict(not_asked)}
        text += f"\n{table}\n{skipped_list(skipped)}{left_out_line(not_asked)}"

    write_json(stage.folder / "metrics.json", stage.figures)
    write_text(stage.folder / "metrics.md", text)
    shown = [f"{name.replace('_', ' ')} {figures['bits_per_byte']:.4f}" for name, figures in domains.items()]
    stage.headline = "bits per byte: " + ", ".join(shown)


def loaded_tasks(stage: Stage, skipped: dict[str, str], not_asked: Counter[str]) -> Any:
    """Write what the tasks of evaluation.json ask, and load them before the texts are evaluated.

    skipped: the tasks to leave out, with the reasons; those that cannot be loaded join them if they may.
    not_asked: see `write_tasks`.
    """
    from recipe.evaluation.tasks.harness import load_tasks
    from recipe.evaluation.tasks.items import write_tasks

    if "01_download" in stage.inputs:
        require_downloads(stage)
    names = [name for name in tasks_of(stage.config, NAME) if name not in skipped]
    folder = stage.folder / "tasks"
    tasks = write_tasks(stage.config, stage.inputs["02_dataset"], folder, names, not_asked)
    return load_tasks(tasks, stage.config["evaluation"], skipped)


def block_sizes(stage: Stage) -> list[int]:
    """The lengths of blocks to evaluate at: block_size first; then the longer ones of the phases and, where
    the context of a checkpoint was changed, the one that it had before.

    A phase with shorter blocks is only on the way.
    """
    block_size = stage.config["pretrain"]["block_size"]
    started = read_record(stage.inputs["05_pretrain"], "figures")["figures"].get("initial_model", {})
    before = started.get("context", {}).get("max_position_embeddings", [block_size])[0]
    others = {phase.get("block_size", 0) for phase in stage.config["pretrain"].get("phases") or []}
    others = {size for size in others if size > block_size}
    others |= {before} if before and before < block_size else set()
    return [block_size, *sorted(others)]


def evaluate_sources(
    stage: Stage, model: Any, tokenizer: Any, bf16: bool, block_size: int
) -> dict[str, dict[str, float]]:
    """The figures of each source that has texts on the validation side."""
    from recipe.evaluation.metrics import evaluate_texts

    config, dataset = stage.config["evaluation"], stage.inputs["02_dataset"]
    most = int(config.get("megabytes_per_source", 1) * 1e6)
    # As many tokens at a time as in the blocks of the training.
    tokens = config.get("batch_size", 8) * stage.config["pretrain"]["block_size"]
    batch_size = max(1, tokens // block_size)
    texts = {name: list(read_texts(dataset, "valid", name, most)) for name in side_sources(dataset, "valid")}
    return {
        name: evaluate_texts(model, tokenizer, of_source, block_size, batch_size, stage.folder, name, bf16)
        for name, of_source in texts.items()
        if of_source
    }


def combine_domains(config: dict[str, Any], sources: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The figures of all sources that were trained on, and of those that were held out as a whole."""
    from recipe.evaluation.metrics import combine

    held_out = held_out_sources(config["dataset"])
    inside = [figures for name, figures in sources.items() if name not in held_out]
    outside = [figures for name, figures in sources.items() if name in held_out]
    return {"in_domain": combine(inside)} | ({"out_of_domain": combine(outside)} if outside else {})


def score_tasks(
    stage: Stage, model: Any, tokenizer: Any, tasks: Any, bf16: bool
) -> tuple[dict[str, Any], str]:
    """The scores of the tasks of evaluation.json, and their table."""
    from recipe.evaluation.tasks.harness import Harness, run_tasks, scores_of, scores_table

    config = stage.config["evaluation"]
    asked = Harness(model, tokenizer, config.get("batch_size", 8), bf16)
    results = run_tasks(asked, tasks, most=config.get("items_per_task"))
    shutil.rmtree(stage.folder / "tasks" / ".cache", ignore_errors=True)
    stage.say(
        f"tasks: {asked.cut:,} prompts were longer than the model's positions, so their beginning was cut; "
        f"{asked.shortened:,} answers were limited to {asked.max_length // 2:,} tokens"
    )
    found = scores_of(results)
    return found, scores_table({"score": found})


def inputs(config: dict[str, Any]) -> tuple[str, ...]:
    """The stages that are read; stage 01 only where a task is made from a source itself."""
    return (*(["01_download"] if reads_sources(config, NAME) else []), "02_dataset", "05_pretrain")


if __name__ == "__main__":
    run_stage(__file__, __doc__, main, ("evaluation",), inputs)
