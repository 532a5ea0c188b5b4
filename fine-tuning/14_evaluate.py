"""Stage 14: measure the tuned model beside the pretrained one: response loss, answers, tasks in the chat
form.

Edit: configs/<recipe>/evaluation.json. Writes: metrics.json, metrics.md, tasks/ (what was asked).
Run:  python fine-tuning/14_evaluate.py --recipe tiny
"""

import math
import shutil
from typing import Any

import pyarrow.parquet as pq
from recipe.config.evaluation import JGLUE_TASKS
from recipe.config.training import tuned_stage
from recipe.conversations.instructions import messages_of, no_pairs
from recipe.corpus.download import require_data
from recipe.project import DATA, RecipeError, read_json, write_json
from recipe.run.stage import Stage, run_stage

ANSWERED = 32  # held-out instructions that are answered, to see whether answers stop by themselves
UNTRAINED = ("reading", *JGLUE_TASKS)  # tasks about nothing that pretraining or tuning has read


def main(stage: Stage) -> None:
    """Both models on the validation pairs: the loss, what they write, and which answer they choose."""
    from recipe.conversations.encode import load_conversations
    from recipe.evaluation.metrics import comparison, computes_in_bf16, total_loss
    from recipe.evaluation.tasks.harness import Harness, markdown, run_tasks, scores
    from recipe.model.build import for_inference, load_model
    from recipe.tokenization.packing import PackedConversations
    from transformers import AutoTokenizer

    tuned = stage.inputs[tuned_stage(stage.config)]
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    pairs = stage.inputs["11_dataset"] / "valid.parquet"
    block_size = stage.config["finetune"]["block_size"]
    batch_size = stage.config["evaluation"].get("batch_size", 8)
    bf16 = computes_in_bf16(stage.config["finetune"])
    conversations, left_out = load_conversations(pairs, tokenizer, block_size)
    samples = PackedConversations(conversations, block_size, tokenizer.pad_token_id)
    rows = pq.read_table(pairs).to_pylist()
    held_out, tasks = ask_about(stage, rows)
    figures: dict = {"conversations": len(conversations), "left_out": left_out}
    for name, folder in (("before", stage.inputs["05_pretrain"]), ("after", tuned)):
        model = for_inference(load_model(folder))
        loss, count = total_loss(model, samples, batch_size, name, bf16)
        found = {"response_loss": loss / count, "perplexity": math.exp(loss / count), "tokens": count}
        found |= answer(stage, model, tokenizer, rows)
        asked = Harness(model, tokenizer, batch_size, bf16)
        logged = by_source(run_tasks(asked, held_out)) | run_tasks(asked, tasks, chat=True)
        scored = {task: scores(of_task) for task, of_task in logged.items()}
        figures[name] = found | {"cut_prompts": asked.cut, "tasks": scored}
    shutil.rmtree(stage.folder / "tasks" / ".cache", ignore_errors=True)
    before, after = figures["before"], figures["after"]
    text = f"{comparison(before, after)}\n{markdown({n: figures[n]['tasks'] for n in ('before', 'after')})}"
    (stage.folder / "metrics.md").write_text(text, "utf-8")
    write_json(stage.folder / "metrics.json", figures)
    stage.figures = figures
    stage.headline = (
        f"response loss {before['response_loss']:.3f} -> {after['response_loss']:.3f}, "
        f"{after['stop_rate']:.0%} of {after['answered']} answers stop by themselves"
    )


def ask_about(stage: Stage, rows: list[dict[str, Any]]) -> tuple[list[dict], list[dict]]:
    """What the harness is told of the held-out instructions, and of the tasks that nothing was trained on."""
    from recipe.evaluation.tasks.harness import as_context
    from recipe.evaluation.tasks.items import held_out_items, write_items, write_tasks

    if "01_download" in stage.inputs:
        record = read_json(stage.inputs["01_download"] / "stage.json")
        require_data(record["figures"], stage.config["dataset"], DATA)
    config, folder = stage.config["evaluation"], stage.folder / "tasks"
    items = held_out_items(rows, as_context, config.get("items_per_task"))
    held_out = [{"task": "held-out"} | write_items(folder, "held-out", {"test": items})] if items else []
    names = [name for name in config.get("tasks", {}) if name in UNTRAINED]
    return held_out, write_tasks(stage.config, stage.inputs["02_dataset"], folder, names)


def by_source(logged: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The samples of the held-out instructions by the source of the pairs."""
    found: dict[str, list[dict]] = {}
    for sample in logged.get("held-out", []):
        found.setdefault(f"held-out {sample['doc']['source']}", []).append(sample)
    return found


def answer(stage: Stage, model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How a model answers held-out instructions, each after what was said before it."""
    from recipe.conversations.encode import encode_conversation
    from recipe.evaluation.generation import generate_all, generation_config
    from recipe.evaluation.metrics import distinct, repetition

    values = stage.config["generation"]
    room = model.config.max_position_embeddings - values["max_new_tokens"]
    chosen = rows[:: max(1, len(rows) // ANSWERED)][
        :ANSWERED
    ]  # of every source: they stand one after another
    prompts = [encode_conversation(tokenizer, messages_of(row)[:-1])[0] for row in chosen]
    fitting = [prompt for prompt in prompts if len(prompt) <= room]
    if not fitting:
        raise RecipeError(
            f"generation.json: max_new_tokens: {values['max_new_tokens']} leaves none of {len(prompts)} "
            "held-out instructions room in the model's positions "
            f"({model.config.max_position_embeddings}). Lower it"
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
    """The data of stage 01 as well, where a task asks about it."""
    downloaded = ["01_download"] if "reading" in config["evaluation"].get("tasks", {}) else []
    return (*downloaded, "02_dataset", "05_pretrain", "11_dataset", tuned_stage(config))


if __name__ == "__main__":
    run_stage(__file__, __doc__, main, ("evaluation", "generation"), inputs, skip=no_pairs)
