"""Stage 15: ask the questions and some held-out instructions, before and after tuning, side by side.

Edit: configs/<recipe>/generation.json. Writes: answers.json, answers.md.
Run:  python fine-tuning/15_generate.py --recipe tiny
"""

import pyarrow.parquet as pq
from recipe.config.training import tuned_stage
from recipe.conversations.instructions import messages_of, no_pairs
from recipe.project import RecipeError, write_json, write_text
from recipe.run.stage import Stage, run_stage

HELD_OUT = 5  # conversations of the validation side whose last answer is asked for as well


def main(stage: Stage) -> None:
    """Answer with the pretrained and with the tuned model, from the same seeds and the same prompts."""
    from recipe.conversations.encode import encode_conversation
    from recipe.evaluation.generation import (
        check_room,
        clean_question,
        evenly,
        generate_all,
        generation_config,
        side_by_side,
    )
    from recipe.evaluation.metrics import repetition
    from recipe.model.build import for_inference, load_model
    from recipe.tokenization.save import load_tokenizer
    from transformers import AutoConfig

    values, tuned = stage.config["generation"], stage.inputs[tuned_stage(stage.config)]
    tokenizer = load_tokenizer(tuned)
    rows = [
        {"prompt": clean_question(stage.config, question), "reference": ""}
        for question in values.get("questions", [])
    ]
    asked = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    pairs = pq.read_table(stage.inputs["11_dataset"] / "valid.parquet").to_pylist()
    for pair in evenly(pairs, HELD_OUT):
        *before, answer = messages_of(pair)
        asked.append(before)
        # A conversation of several turns is shown as one line.
        rows.append({"prompt": " → ".join(m["content"] for m in before), "reference": answer["content"]})
    config = generation_config(values, tokenizer)
    prompts = [encode_conversation(tokenizer, messages)[0] for messages in asked]
    # A question of generation.json that is too long is refused below; a held-out one is left out.
    room = AutoConfig.from_pretrained(tuned).max_position_embeddings - config.max_new_tokens
    own = len(values.get("questions", []))
    kept = [i for i, ids in enumerate(prompts) if i < own or len(ids) <= room]
    too_long = len(prompts) - len(kept)
    rows, prompts = [rows[i] for i in kept], [prompts[i] for i in kept]
    if not rows:
        raise RecipeError(
            "generation.json: questions: there are none, and no held-out instruction fits into the "
            f"model's positions with max_new_tokens {config.max_new_tokens}. Write questions, or lower "
            "max_new_tokens"
        )
    for name, folder in (("before", stage.inputs["05_pretrain"]), ("after", tuned)):
        model = for_inference(load_model(folder))
        for row, ids in zip(rows, prompts, strict=True):
            check_room(model, ids, config, row["prompt"])
        answers = generate_all(model, tokenizer, prompts, config, values.get("seed", 42))
        for row, answer in zip(rows, answers, strict=True):
            row[name] = answer.text
    write_json(stage.folder / "answers.json", rows)
    write_text(stage.folder / "answers.md", side_by_side(rows))
    rate = sum(repetition(row["after"]) for row in rows) / len(rows)
    stopped = sum(answer.stopped for answer in answers)
    stage.figures = {"answers": rows, "repetition": rate, "stop_rate": stopped / len(rows)}
    stage.figures["too_long_to_ask"] = too_long
    stage.headline = f"{len(rows)} questions, {stopped} answers stop by themselves, repetition {rate:.1%}"


if __name__ == "__main__":
    run_stage(
        __file__,
        __doc__,
        main,
        ("generation",),
        lambda config: ("05_pretrain", "11_dataset", tuned_stage(config)),
        skip=no_pairs,
    )
