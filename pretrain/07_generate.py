"""Stage 07: let the model continue the prompts, before and after training, side by side.

Edit: configs/<recipe>/generation.json. Writes: samples.json, samples.md.
Run:  python pretrain/07_generate.py --recipe tiny
"""

from recipe.project import write_json, write_text
from recipe.run.stage import Stage, run_stage


def main(stage: Stage) -> None:
    """Generate with the model as it was before the first step and with the trained one, from the same seeds.

    The model before training has random weights, or is the published checkpoint of `initial_model`. That one
    does not know the tokens of new_pieces: its prompts are spelled with its own tokens instead.
    """
    from recipe.config.initial_model import find_initial, read_new_pieces
    from recipe.evaluation.generation import (
        check_room,
        clean_prompt,
        generate_all,
        generation_config,
        side_by_side,
    )
    from recipe.evaluation.metrics import repetition
    from recipe.model.build import build_model, for_inference, load_model, load_published
    from recipe.tokenization.encode_text import prompt_ids
    from recipe.tokenization.save import load_tokenizer
    from transformers import GenerationConfig

    values = stage.config["generation"]
    tokenizer = load_tokenizer(stage.inputs["05_pretrain"])
    seed = stage.config["pretrain"].get("seed", 42)
    initial = find_initial(stage.config["pretrain"])
    pieces = read_new_pieces(stage.inputs["03_tokenizer"], len(tokenizer))
    before = (
        load_published(initial) if initial else build_model(stage.config["model"], tokenizer, "sdpa", seed)
    )
    if initial:
        # Both models are sampled with the values of generation.json only.
        before.generation_config = GenerationConfig.from_model_config(before.config)
    models = {
        "before": for_inference(before),
        "after": for_inference(load_model(stage.inputs["05_pretrain"])),
    }
    config, count = generation_config(values, tokenizer), values.get("num_return_sequences", 1)
    prompts = [prompt_ids(tokenizer, clean_prompt(stage.config, prompt)) for prompt in values["prompts"]]
    asked = {"before": [pieces.spelled(ids) if initial else ids for ids in prompts], "after": prompts}
    for name, model in models.items():
        for prompt, ids in zip(values["prompts"], asked[name], strict=True):
            check_room(model, ids, config, prompt)
    rows = [{"prompt": prompt} for prompt in values["prompts"]]
    for name, model in models.items():
        several = [ids for ids in asked[name] for _ in range(count)]
        answers = generate_all(model, tokenizer, several, config, values.get("seed", 42))
        for i, row in enumerate(rows):
            texts = [answer.text for answer in answers[i * count : (i + 1) * count]]
            row[name] = texts if count > 1 else texts[0]
    rate = sum(repetition(answer.text) for answer in answers) / len(answers)
    write_json(stage.folder / "samples.json", rows)
    write_text(stage.folder / "samples.md", side_by_side(rows))
    stage.figures = {"samples": rows, "repetition": rate}
    stage.headline = f"{len(answers)} samples, repetition {rate:.1%} of character 8-grams"


if __name__ == "__main__":
    run_stage(__file__, __doc__, main, ("generation", "model"), ("03_tokenizer", "05_pretrain"))
