"""Stage 15: ask the five questions, and some held-out instructions, before and after tuning, side by side.

Edit: configs/<recipe>/generation.json. Writes: answers.json, answers.md.
Run:  python fine-tuning/15_generate.py --recipe tiny
"""

import pyarrow.parquet as pq
from recipe.config import tuned_stage
from recipe.instructions import no_pairs
from recipe.outputs import Stage, run_stage, write_json
from recipe.templates import user_message

HELD_OUT = 5  # instructions of the validation side that are asked beside the questions


def main(stage: Stage) -> None:
    """Answer with the pretrained and with the tuned model, from the same seeds and the same prompts."""
    from recipe.chat import encode_conversation
    from recipe.evaluation import repetition
    from recipe.generation import check_room, clean_prompt, generate_all, generation_config, side_by_side
    from recipe.modeling import for_inference, load_model
    from transformers import AutoTokenizer

    values, tuned = stage.config["generation"], stage.inputs[tuned_stage(stage.config)]
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    rows = [
        {"prompt": clean_prompt(stage.config, question), "wanted": ""}
        for question in values.get("questions", [])
    ]
    pairs = pq.read_table(stage.inputs["11_dataset"] / "valid.parquet").to_pylist()
    for pair in pairs[:: max(1, len(pairs) // HELD_OUT)][:HELD_OUT]:
        rows.append({"prompt": user_message(pair["instruction"], pair["input"]), "wanted": pair["output"]})
    questions = [{"role": "user", "content": row["prompt"]} for row in rows]
    config = generation_config(values, tokenizer)
    prompts = [encode_conversation(tokenizer, [question])[0] for question in questions]
    for name, folder in (("before", stage.inputs["05_pretrain"]), ("after", tuned)):
        model = for_inference(load_model(folder))
        for row, ids in zip(rows, prompts, strict=True):
            check_room(model, ids, config, row["prompt"])
        answers = generate_all(model, tokenizer, prompts, config, values.get("seed", 42))
        for row, answer in zip(rows, answers, strict=True):
            row[name] = answer.text
    write_json(stage.folder / "answers.json", rows)
    (stage.folder / "answers.md").write_text(side_by_side(rows), "utf-8")
    rate = sum(repetition(row["after"]) for row in rows) / len(rows)
    stopped = sum(answer.stopped for answer in answers)
    stage.figures = {"answers": rows, "repetition": rate, "stop_rate": stopped / len(rows)}
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
