"""Stage 14: compare the tuned model with the pretrained one: response loss, answers, scores of tasks.

Tasks are asked in the chat form. Edit: configs/<recipe>/evaluation.json.
Writes: metrics.json, metrics.md, tasks/ (what was asked).
Run:  python fine-tuning/14_evaluate.py --recipe tiny
"""

import shutil
from collections import Counter
from typing import Any

import pyarrow.parquet as pq
from recipe.config.tasks import reads_sources, tasks_of
from recipe.config.training import tuned_stage
from recipe.conversations.instructions import messages_of, no_pairs
from recipe.evaluation.tasks.available import check_available, left_out_line, skipped_list
from recipe.project import RecipeError, write_json, write_text
from recipe.run.stage import Stage, require_downloads, run_stage

NAME = "14_evaluate"
ANSWERED = 32  # held-out instructions that are answered, to see whether answers stop by themselves


def main(stage: Stage) -> None:
    """Measure both models on the validation pairs and the tasks, and write the figures side by side."""
    skipped = check_available(stage.config)
    from recipe.conversations.encode import load_conversations
    from recipe.evaluation.metrics import comparison, computes_in_bf16, perplexity, total_loss
    from recipe.evaluation.tasks.harness import load_tasks, scores_table
    from recipe.model.build import for_inference, load_model
    from recipe.tokenization.packing import PackedConversations
    from recipe.tokenization.save import load_tokenizer

    tuned = stage.inputs[tuned_stage(stage.config)]
    tokenizer = load_tokenizer(tuned)
    pairs = stage.inputs["11_dataset"] / "valid.parquet"
    block_size = stage.config["finetune"]["block_size"]
    batch_size = stage.config["evaluation"].get("batch_size", 8)
    bf16 = computes_in_bf16(stage.config["finetune"])
    conversations, left_out = load_conversations(pairs, tokenizer, block_size)
    samples = PackedConversations(conversations, block_size, tokenizer.pad_token_id)
    rows = pq.read_table(pairs).to_pylist()
    not_asked: Counter[str] = Counter()
    held_out = load_tasks(held_out_task(stage, rows, not_asked))
    tasks = load_tasks(written_tasks(stage, skipped, not_asked), stage.config["evaluation"], skipped)

    figures: dict[str, Any] = {"conversations": len(conversations), "left_out": left_out}
    figures |= {"skipped_tasks": skipped, "not_asked": dict(not_asked)}
    for name, folder in (("before", stage.inputs["05_pretrain"]), ("after", tuned)):
        model = for_inference(load_model(folder))
        total, count = total_loss(model, samples, batch_size, name, bf16)
        loss = total / count
        figures[name] = {"response_loss": loss, "perplexity": perplexity(loss, name), "tokens": count}
        figures[name] |= answer(stage, model, tokenizer, rows)
        figures[name] |= score(stage, model, tokenizer, held_out, tasks, bf16)
    shutil.rmtree(stage.folder / "tasks" / ".cache", ignore_errors=True)

    before, after = figures["before"], figures["after"]
    tables = (comparison(before, after), scores_table({"before": before["tasks"], "after": after["tasks"]}))
    tables += tuple(filter(None, (skipped_list(skipped), left_out_line(not_asked))))
    write_text(stage.folder / "metrics.md", "\n".join(tables))
    write_json(stage.folder / "metrics.json", figures)
    stage.figures = figures
    stage.headline = (
        f"response loss {before['response_loss']:.3f} -> {after['response_loss']:.3f}, "
        f"{after['stop_rate']:.0%} of {after['answered']} answers stop by themselves"
    )


def held_out_task(stage: Stage, rows: list[dict[str, Any]], not_asked: Counter[str]) -> list[dict[str, Any]]:
    """Write the questions about held-out instructions, and return what `load_tasks` needs of them.

    rows: the pairs of the validation side. not_asked: see `write_tasks`. The list is empty where they make no
    question.
    """
    from recipe.evaluation.tasks.harness import as_context
    from recipe.evaluation.tasks.items import held_out_items, write_items

    most = stage.config["evaluation"].get("items_per_task")
    items, not_asked["held-out"] = held_out_items(rows, as_context, most)
    if not items:
        return []
    return [{"task": "held-out"} | write_items(stage.folder / "tasks", "held-out", {"test": items})]


def written_tasks(stage: Stage, skipped: dict[str, str], not_asked: Counter[str]) -> list[dict[str, Any]]:
    """Write what the tasks of evaluation.json ask, and return what `load_tasks` needs of each.

    skipped: the tasks to leave out. not_asked: see `write_tasks`.
    """
    from recipe.evaluation.tasks.items import write_tasks

    if "01_download" in stage.inputs:
        require_downloads(stage)
    names = [name for name in tasks_of(stage.config, NAME) if name not in skipped]
    return write_tasks(stage.config, stage.inputs["02_dataset"], stage.folder / "tasks", names, not_asked)


def score(stage: Stage, model: Any, tokenizer: Any, held_out: Any, tasks: Any, bf16: bool) -> dict[str, Any]:
    """The scores of a model: held-out instructions by the source of the pairs, then the tasks."""
    from recipe.evaluation.tasks.harness import Harness, run_tasks, scores, scores_of

    config = stage.config["evaluation"]
    asked = Harness(model, tokenizer, config.get("batch_size", 8), bf16)
    by_source: dict[str, list[dict]] = {}
    for sample in run_tasks(asked, held_out)["samples"].get("held-out", []):
        by_source.setdefault(f"held-out {sample['doc']['source']}", []).append(sample)
    found = {name: scores(samples) for name, samples in by_source.items()}
    found |= scores_of(run_tasks(asked, tasks, chat=True, most=config.get("items_per_task")))
    return {"cut_prompts": asked.cut, "shortened_answers": asked.shortened, "tasks": found}


def answer(stage: Stage, model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures about the answers to held-out instructions, each after what was said before it."""
    from recipe.conversations.encode import encode_conversation
    from recipe.evaluation.generation import evenly, generate_all, generation_config
    from recipe.evaluation.metrics import distinct, repetition

    values = stage.config["generation"]
    room = model.config.max_position_embeddings - values["max_new_tokens"]
    chosen = evenly(rows, ANSWERED)
    prompts = [encode_conversation(tokenizer, messages_of(row)[:-1])[0] for row in chosen]
    fitting = [prompt for prompt in prompts if len(prompt) <= room]
    if not fitting:
        raise RecipeError(
            f"generation.json: max_new_tokens: {values['max_new_tokens']}, but none of {len(prompts)} "
            "held-out instructions fits with such an answer into the model's "
            f"{model.config.max_position_embeddings} positions. Lower max_new_tokens"
        )
    settings = generation_config(values, tokenizer)
    answers = generate_all(model, tokenizer, fitting, settings, values.get("seed", 42))
    texts = [found.text for found in answers]
    return {
        "answered": len(answers),
        "too_long_to_answer": len(prompts) - len(fitting),
        "stop_rate": sum(found.stopped for found in answers) / len(answers),
        "repetition": sum(map(repetition, texts)) / len(texts),
        "distinct_2": distinct(texts, 2),
        "distinct_4": distinct(texts, 4),
    }


def inputs(config: dict[str, Any]) -> tuple[str, ...]:
    """The stages that are read; stage 01 only where a task is made from a source itself."""
    downloaded = ["01_download"] if reads_sources(config, NAME) else []
    return (*downloaded, "02_dataset", "05_pretrain", "11_dataset", tuned_stage(config))


if __name__ == "__main__":
    run_stage(__file__, __doc__, main, ("evaluation", "generation"), inputs, skip=no_pairs)
