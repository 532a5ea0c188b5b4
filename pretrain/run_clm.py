"""Stage 05: causal language modelling, from scratch or from a published checkpoint.

The launcher starts this script on every rank, with a plan of settings and paths.

Run:  bash pretrain/05_pretrain.sh --recipe tiny
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.training.prepare import check_steps, place, prepare, total_steps, whole_model
from recipe.training.script import run_script
from recipe.training.training import speed_of, train_model

if TYPE_CHECKING:
    from recipe.tokenization.token_files import TokenFile
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

CHECKED = 20  # documents whose text the tokenizer of the saved folder must encode alike


def main(plan: dict[str, Any]) -> None:
    """Build or load the model, pack the data, train and save; rank 0 writes result.json for the stage."""
    from recipe.config.initial_model import check_rows, describe_initial, find_initial, read_new_pieces
    from recipe.config.phases import longest_block, phases_of, samples_of
    from recipe.evaluation.generation import clean_prompt
    from recipe.model.build import build_model, continued_model
    from recipe.project import read_record, write_json
    from recipe.run.publication import RESULT, write_last
    from recipe.tokenization.encode_text import prompt_ids
    from recipe.tokenization.packing import PackedBlocks, check_vocabulary, epoch_tokens, weighted_sources
    from recipe.tokenization.phased import phased_blocks
    from recipe.tokenization.save import check_auto_tokenizer, load_tokenizer
    from recipe.tokenization.token_files import TokenFile
    from recipe.training.curves import write_curves
    from recipe.training.sample_prompts import SamplePrompts
    from torch.utils.data import Subset
    from transformers import AutoConfig

    run = prepare(plan, "pretrain")
    settings, arguments, folder = run.settings, run.arguments, run.folder
    tokenizer = load_tokenizer(plan["inputs"]["03_tokenizer"])
    tokens = Path(plan["inputs"]["04_tokenize"])
    train_file, valid_file = TokenFile(tokens / "train"), TokenFile(tokens / "valid")
    counted = read_record(tokens, "figures")["figures"]
    totals = counted["totals"]
    sources = weighted_sources(counted["sources"]["train"], plan["config"]["dataset"]["sources"])

    epoch = epoch_tokens(train_file, sources)
    blocks = -(-epoch // settings.block_size)
    arguments.max_steps, _ = total_steps(arguments, blocks, settings.global_batch_size)
    values = plan["config"]["pretrain"]
    check_steps(run, values, "pretrain", blocks)
    count = arguments.max_steps * settings.global_batch_size
    phases = phases_of(values, arguments.max_steps) if settings.phases else []
    pad, seed = tokenizer.pad_token_id, arguments.seed
    if phases:
        sizes = samples_of(values)[0], longest_block(values)
        mixture = counted["sources"]["train"], plan["config"]["dataset"]["sources"]
        samples = phased_blocks(train_file, phases, *sizes, pad, seed, *mixture)
    else:
        samples = PackedBlocks(train_file, settings.block_size, pad, seed, count, sources)
    valid = PackedBlocks(valid_file, settings.block_size, pad, seed=0)
    valid = Subset(valid, range(min(len(valid), settings.eval_blocks or len(valid))))
    initial = find_initial(values)
    new_tokens = read_new_pieces(Path(plan["inputs"]["03_tokenizer"]), len(tokenizer))

    def build() -> Any:
        shape, attention = plan["config"]["model"], run.choice.attention
        if initial:
            return continued_model(initial, shape, tokenizer, new_tokens, attention)
        return build_model(shape, tokenizer, attention, seed)

    check_rows(values, new_tokens)
    with whole_model(arguments):
        model = place(run, build)
    check_auto_tokenizer(tokenizer, model.config.model_type, first_texts(valid_file, tokenizer))
    for file in (train_file, valid_file):
        check_vocabulary(file, totals[file.prefix.name]["largest_id"], model.config.vocab_size)
    if run.is_main:
        batch = f"{settings.global_batch_size} x {settings.block_size} tokens"
        share = f"{count / blocks:.2f} epochs of {epoch:,} tokens"
        print(f"{size_of(model)}, {arguments.max_steps:,} steps x {batch} = {share}", flush=True)
    # Every token of a document but <s> is predicted and has a loss.
    bytes_per_token = totals["valid"]["bytes"] / (totals["valid"]["tokens"] - totals["valid"]["documents"])
    generation = plan["config"]["generation"]
    texts = [clean_prompt(plan["config"], prompt) for prompt in generation["prompts"]]
    prompts = {text: prompt_ids(tokenizer, text) for text in texts}
    sampling = SamplePrompts(settings.sample_steps, prompts, generation, tokenizer, folder)
    figures = train_model(
        run,
        model,
        tokenizer,
        samples,
        valid,
        bytes_per_token=bytes_per_token,
        sampling=sampling,
        phases=phases,
    )
    if phases:
        figures["phases"] = [phase._asdict() for phase in phases]
    if run.probe and run.is_main:
        write_json(folder / RESULT, figures)
    elif run.is_main:
        tokens_per_step = settings.global_batch_size * settings.block_size
        changes = [phase.begin * tokens_per_step for phase in phases[1:]]
        write_curves(folder, f"pretraining, recipe {plan['recipe']}", changes=changes)
        headline = f"{figures['tokens']:,} tokens, valid loss {figures['eval_loss']:.4f}{speed_of(figures)}"
        if initial:
            before, rows = AutoConfig.from_pretrained(initial).vocab_size, model.config.vocab_size
            origin = describe_initial(plan["config"], initial, new_tokens, before, rows)
            figures["initial_model"], headline = origin, f"{headline}, from {origin['name']}"
        write_last(folder / RESULT, figures | {"headline": headline})


def first_texts(file: TokenFile, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The texts of the first `CHECKED` documents of a token file."""
    bounds = [file.first_token(number) for number in range(min(CHECKED, file.documents) + 1)]
    ids = [file.tokens[begin:end].tolist() for begin, end in pairwise(bounds)]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def size_of(model: PreTrainedModel) -> str:
    """The number of parameters in words, and of those that a token uses where a model has experts."""
    from recipe.model.build import active_parameter_count, parameter_count

    whole, active = parameter_count(model), active_parameter_count(model)
    return f"{whole:,} parameters" + (f" ({active:,} active)" if active != whole else "")


if __name__ == "__main__":
    run_script(main)
