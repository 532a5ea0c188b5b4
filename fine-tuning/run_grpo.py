"""Stage 13 with the method grpo: train the tuned model by rewards for the answers that it writes.

run_dpo.py calls it on every rank when preference.json says ``"method": "grpo"``.
"""

from pathlib import Path
from typing import Any

from recipe.training.prepare import check_steps, prepare, total_steps
from recipe.training.training import train_model

MEASURED = 256  # questions of the validation side, at most: the model writes an answer to each of them


def main(plan: dict[str, Any]) -> None:
    """Encode the questions, let the model answer, train by the rewards, save; rank 0 writes result.json."""
    from datasets import Dataset
    from recipe.config.preference import NUM_GENERATIONS, OWN, with_valid_share
    from recipe.conversations.encode import check_template, encode_conversation
    from recipe.conversations.preferences import preferences_table
    from recipe.conversations.questions import encode_questions, load_questions
    from recipe.model.build import load_model, without_dropout
    from recipe.project import RecipeError, read_json_lines, write_text
    from recipe.run.publication import RESULT, write_last
    from recipe.tokenization.save import load_tokenizer
    from recipe.training.curves import write_curves
    from recipe.training.files import METRICS
    from recipe.training.group_trainer import GroupTrainer
    from trl import GRPOConfig

    preference = with_valid_share(plan["config"])
    group, longest = preference.get("num_generations", NUM_GENERATIONS), preference["max_completion_length"]
    values = {key: value for key, value in preference.items() if key not in OWN}
    # The lengths of batches differ, so nothing is compiled. `encode_questions` shuffles.
    fixed = {"num_generations": group, "shuffle_dataset": False, "torch_compile": False, "spikes": None}
    fixed |= {"activation_checkpointing": bool(values.get("activation_checkpointing"))}
    # `GroupTrainer.evaluate` needs no whole groups.
    fixed |= {"eval_on_start": True, "num_generations_eval": 1}
    run = prepare(plan | {"config": plan["config"] | {"preference": values}}, "preference", GRPOConfig, fixed)
    settings, arguments, folder = run.settings, run.arguments, run.folder
    base = Path(plan["inputs"]["12_finetune"])
    tokenizer = load_tokenizer(base)
    check_template(tokenizer)
    sides, funnel = load_questions(preference, plan["config"]["dataset"])
    room = settings.block_size - longest
    questions_per_step = settings.global_batch_size // group

    def encoded(side: str, seed: int, **ends: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
        rows, left_out = encode_questions(
            sides[side], lambda messages: encode_conversation(tokenizer, messages)[0], room, seed, **ends
        )
        if not rows:
            raise RecipeError(
                f"preference.json: none of {len(sides[side])} questions on the {side} side fits into {room} "
                f"tokens (block_size {settings.block_size} without max_completion_length {longest}). Raise "
                "block_size, or lower max_completion_length"
            )
        return rows, left_out

    if arguments.max_steps <= 0:
        fitting, _ = encoded("train", arguments.seed, epochs=1)
        arguments.max_steps, _ = total_steps(arguments, len(fitting), questions_per_step)
    check_steps(run, preference, "preference", len(sides["train"]))
    left_out = {}
    rows, left_out["train"] = encoded("train", arguments.seed, count=arguments.max_steps * questions_per_step)
    valid, left_out["valid"] = encoded("valid", 0, count=MEASURED, epochs=1)
    # It answers in training mode: with dropout, another model would write than the one that is measured.
    model = without_dropout(load_model(base, run.choice.attention))
    if run.is_main:
        print(
            f"{len(sides['train']):,} questions, {questions_per_step} x {group} answers a step, "
            f"{arguments.max_steps:,} steps; {funnel}; left out: {left_out}",
            flush=True,
        )
    mean = sum(len(row["prompt"]) for row in rows) / len(rows)
    figures = train_model(
        run,
        model,
        tokenizer,
        Dataset.from_list(rows),
        Dataset.from_list(valid),
        trainer_class=GroupTrainer,
        # The most that a step can have: the lengths of the answers are known only when they are written.
        tokens_per_step=round(settings.global_batch_size * (mean + longest)),
        processing_class=tokenizer,
        rewards=preference["rewards"],
    )
    if run.is_main:
        measured = [row for row in read_json_lines(folder / METRICS) if "eval_reward" in row]
        before, after = measured[0]["eval_reward"], measured[-1]["eval_reward"]
        write_curves(folder, f"rewards, recipe {plan['recipe']}", with_perplexity=False)
        write_text(folder / "funnel.md", preferences_table(funnel))
        figures |= {"pairs": funnel, "left_out": left_out, "tokens": measured[-1]["tokens"]}
        figures |= {"reward_before": before, "reward": after}
        headline = f"{figures['steps']:,} steps, valid reward {before:.3f} -> {after:.3f}"
        write_last(folder / RESULT, figures | {"headline": headline})
