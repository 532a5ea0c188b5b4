"""Stage 12: instruction tuning with a loss on answers only.

The launcher starts this script on every rank, with a plan of settings and paths.

Run:  bash fine-tuning/12_finetune.sh --recipe tiny
"""

from pathlib import Path
from typing import Any

from recipe.training.prepare import check_steps, place, prepare, total_steps, whole_model
from recipe.training.script import run_script
from recipe.training.training import speed_of, train_model


def main(plan: dict[str, Any]) -> None:
    """Add the chat template, pack the conversations, train and save; rank 0 writes result.json."""
    from recipe.config.chat_templates import FORMS, chat_template, response_template
    from recipe.conversations.encode import encode_conversation, load_conversations, preview
    from recipe.evaluation.generation import clean_question
    from recipe.model.adapters import finish_adapter, load_with_adapter
    from recipe.model.build import load_model, trained_parameter_count
    from recipe.project import listed
    from recipe.run.publication import RESULT, write_last
    from recipe.tokenization.packing import PackedConversations
    from recipe.tokenization.save import load_tokenizer
    from recipe.training.curves import write_curves
    from recipe.training.sample_prompts import SamplePrompts
    from torch.utils.data import Subset

    run = prepare(plan, "finetune")
    settings, arguments, folder = run.settings, run.arguments, run.folder
    base, instruction = Path(plan["inputs"]["05_pretrain"]), plan["config"]["instruction"]
    tokenizer = load_tokenizer(base)
    form = instruction.get("template", FORMS[0])
    tokenizer.chat_template = chat_template(form, instruction.get("system", ""))
    tokenizer.response_template = response_template(form, tokenizer.eos_token)
    pairs = Path(plan["inputs"]["11_dataset"])
    conversations, counts = load_conversations(pairs / "train.parquet", tokenizer, settings.block_size)
    held_out, valid_counts = load_conversations(pairs / "valid.parquet", tokenizer, settings.block_size)
    once = PackedConversations(conversations, settings.block_size, tokenizer.pad_token_id, arguments.seed)
    arguments.max_steps, epochs = total_steps(arguments, len(once), settings.global_batch_size)
    check_steps(run, plan["config"]["finetune"], "finetune", len(once))
    samples = PackedConversations(
        conversations, settings.block_size, tokenizer.pad_token_id, arguments.seed, epochs
    )
    valid = PackedConversations(held_out, settings.block_size, tokenizer.pad_token_id, seed=0)
    valid = Subset(valid, range(min(len(valid), settings.eval_blocks or len(valid))))
    if settings.lora:
        model = load_with_adapter(base, run.choice.attention, settings.lora, arguments)
    else:
        model = place(run, lambda: load_model(base, run.choice.attention))
    if run.is_main:
        print(preview(conversations[:3], tokenizer), flush=True)
        share = arguments.max_steps * settings.global_batch_size / len(once)
        print(
            f"{len(conversations):,} conversations in {len(once):,} blocks, {arguments.max_steps:,} steps = "
            f"{share:.2f} epochs; left out: {listed(counts)}",
            flush=True,
        )
    generation = plan["config"]["generation"]
    texts = [clean_question(plan["config"], question) for question in generation.get("questions", [])]
    questions = {
        text: encode_conversation(tokenizer, [{"role": "user", "content": text}])[0] for text in texts
    }
    sampling = SamplePrompts(settings.sample_steps, questions, generation, tokenizer, folder)
    figures = train_model(run, model, tokenizer, samples, valid, sampling=sampling)
    if run.is_main:
        if settings.lora:
            with whole_model(arguments):
                finish_adapter(base, folder)
            figures["trained_parameters"] = trained_parameter_count(model)
        write_curves(folder, f"tuning, recipe {plan['recipe']}")
        figures["left_out"] = {"train": counts, "valid": valid_counts}
        headline = f"{figures['steps']:,} steps, response loss {figures['eval_loss']:.4f}{speed_of(figures)}"
        write_last(folder / RESULT, figures | {"headline": headline})


if __name__ == "__main__":
    run_script(main)
