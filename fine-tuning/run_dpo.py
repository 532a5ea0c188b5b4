"""Stage 13: direct preference optimisation of the tuned model; with the method grpo, run_grpo.py takes over.

The launcher starts this script on every rank, with a plan of settings and paths.

Run:  bash fine-tuning/13_preference.sh --recipe tiny
"""

from collections import Counter
from pathlib import Path
from typing import Any

from recipe.config.preference import OWN, uses_rewards, with_valid_share
from recipe.training.prepare import check_steps, prepare, total_steps, whole_model
from recipe.training.script import run_script
from recipe.training.training import train_model


def main(plan: dict[str, Any]) -> None:
    """Encode the preferences, train with the tuned model as reference, save; rank 0 writes result.json."""
    if uses_rewards(plan["config"]):
        import run_grpo

        run_grpo.main(plan)
        return
    from recipe.conversations.encode import check_template, encode_conversation
    from recipe.conversations.preferences import (
        encode_preferences,
        load_preferences,
        preferences_table,
    )
    from recipe.corpus.characters import make_dialogue_normalizer
    from recipe.model.adapters import finish_adapter, load_with_adapter
    from recipe.model.build import load_model, trained_parameter_count, without_dropout
    from recipe.project import RecipeError, write_text
    from recipe.run.publication import RESULT, write_last
    from recipe.tokenization.save import load_tokenizer
    from recipe.training.curves import write_curves
    from recipe.training.preference_trainer import PreferenceTrainer, in_order
    from trl import DPOConfig

    # The ids are ready and short enough. The lengths of batches differ, so nothing is compiled.
    fixed = {"max_length": None, "torch_compile": False}
    values = {key: value for key, value in plan["config"]["preference"].items() if key not in OWN}
    fixed |= {"activation_checkpointing": bool(values.get("activation_checkpointing"))}
    tuning = plan | {"config": plan["config"] | {"preference": values}}
    run = prepare(tuning, "preference", DPOConfig, fixed)
    settings, arguments, folder = run.settings, run.arguments, run.folder
    base = Path(plan["inputs"]["12_finetune"])
    tokenizer = load_tokenizer(base)
    check_template(tokenizer)
    found_characters: Counter[str] = Counter()
    normalize = make_dialogue_normalizer(plan["config"]["dataset"], found_characters)
    sides, funnel = load_preferences(with_valid_share(plan["config"]), normalize, found_characters)
    rows, left_out = {}, {}
    for side, preferences in sides.items():
        found = encode_preferences(
            preferences, lambda messages: encode_conversation(tokenizer, messages)[0], settings.block_size
        )
        rows[side] = list(found)
        left_out[side] = {"longer than block_size": len(preferences) - len(rows[side])}
        if not rows[side]:
            raise RecipeError(
                f"preference.json: none of {len(preferences)} preferences on the {side} side fits into "
                f"block_size {settings.block_size}. Raise it"
            )
    arguments.max_steps, epochs = total_steps(arguments, len(rows["train"]), settings.global_batch_size)
    check_steps(run, plan["config"]["preference"], "preference", len(rows["train"]))
    if settings.lora:
        model = without_dropout(load_with_adapter(base, run.choice.attention, settings.lora, arguments))
        reference = None  # the same weights without the adapter
    else:
        model = without_dropout(load_model(base, run.choice.attention))
        reference = load_model(base, run.choice.attention)
    lengths = [sum(map(len, row.values())) + len(row["prompt_ids"]) for row in rows["train"]]
    if run.is_main:
        print(f"{len(rows['train']):,} preferences, {arguments.max_steps:,} steps; {funnel}", flush=True)
    figures = train_model(
        run,
        model,
        tokenizer,
        in_order(rows["train"], arguments.seed, epochs),
        in_order(rows["valid"], 0, 1),
        trainer_class=PreferenceTrainer,
        tokens_per_step=round(settings.global_batch_size * sum(lengths) / len(lengths)),
        ref_model=reference,
        processing_class=tokenizer,
    )
    if run.is_main:
        if settings.lora:
            with whole_model(arguments):
                finish_adapter(base, folder)
            figures["trained_parameters"] = trained_parameter_count(model)
        write_curves(folder, f"preferences, recipe {plan['recipe']}", with_perplexity=False)
        write_text(folder / "funnel.md", preferences_table(funnel))
        figures |= {"pairs": funnel, "left_out": left_out}
        headline = f"{figures['steps']:,} steps, valid preference loss {figures['eval_loss']:.4f}"
        write_last(folder / RESULT, figures | {"headline": headline})


if __name__ == "__main__":
    run_script(main)
