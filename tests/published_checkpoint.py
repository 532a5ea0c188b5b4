"""A published checkpoint of random weights with its tokenizer, as several tests start from it."""

import argparse
import json

import pytest
import torch
from conftest import EXPERTS, GEMMA3, SHAPE, sentences
from recipe.config import initial_model
from recipe.config.recipe import check_recipe, load_recipe
from recipe.model import build
from recipe.project import Refused
from recipe.run import launch_options
from recipe.tokenization import published
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Tokenizer

TEXT = sentences(600, 5)


FLAT = {key: value for key, value in SHAPE.items() if key != "head_dim"}
SMALL = {
    "llama": FLAT,
    "qwen2": FLAT,
    "olmo2": FLAT,
    "gemma3_text": SHAPE | GEMMA3,
    "qwen3_moe": SHAPE | EXPERTS,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
    "gpt_neox": {key: SHAPE[key] for key in SHAPE if key not in ("head_dim", "num_key_value_heads")},
}


def write_tokenizer(folder, end="<|end|>", core=None):
    """A byte-level BPE of a little Japanese, 300 tokens, with an end token.

    core: a tokenizer with a normalizer and rules of splitting of its own.
    """
    tokenizer = core or Tokenizer(models.BPE())
    if core is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=299, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT[:50], trainer)
    tokenizer.add_special_tokens([end])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))


def write_qwen2_tokenizer(folder):
    """The same as Qwen2 publishes its own: with its rules of splitting, and its end token."""
    write_tokenizer(folder, "<|endoftext|>", Tokenizer.from_str(Qwen2Tokenizer().backend_tokenizer.to_str()))


def write_checkpoint(folder, model_type="llama", rows=300, **values):
    """A published folder: tokenizer, config.json and safetensors of random weights."""
    folder.mkdir()
    (write_qwen2_tokenizer if model_type == "qwen2" else write_tokenizer)(folder)
    made = AutoConfig.for_model(model_type, **SMALL[model_type] | values | {"vocab_size": rows})
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    return folder


def extended(folder, new_pieces):
    """The folder's tokenizer with new tokens, and their record."""
    values = {"kind": "published", "published": str(folder), "new_pieces": new_pieces}
    tokenizer, old_ids = published.take_over(published.load_published(folder), values, TEXT)
    return tokenizer, initial_model.NewPieces(len(tokenizer) - len(old_ids), old_ids)


def load(folder, tokenizer, new_tokens, **values):
    return build.continued_model(folder, values, tokenizer, new_tokens)


def recipe_of(folder, **changes):
    values = load_recipe("tiny")
    values["model"] = {}
    values["tokenizer"] = {"kind": "published", "published": str(folder)}
    values["pretrain"] |= {"initial_model": str(folder)}
    for key, value in changes.items():
        file, _, name = key.partition("_")
        values[file] = values[file] | {name: value} if name else value
    return values


def refusal(values):
    with pytest.raises(Refused) as caught:
        check_recipe(values, "configs/x")
    return str(caught.value)


def default_options():
    parser = argparse.ArgumentParser()
    launch_options.add_options(parser)
    return parser.parse_args([])
