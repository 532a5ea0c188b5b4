"""A training of a tiny model in this process: what the tests of recipe.training and recipe.model share.

A test module that uses the fixtures says ``pytest_plugins = ["tiny_training"]``. (PYTEST_DONT_REWRITE: the
module is also imported as usual.)
"""

import json
import os
import platform
import signal

import pytest
import torch
from conftest import sentences
from recipe.config.phases import longest_block, phases_of, samples_of
from recipe.model.build import build_model
from recipe.tokenization.encode_text import document_ids, prompt_ids
from recipe.tokenization.packing import PackedBlocks
from recipe.tokenization.phased import phased_blocks
from recipe.tokenization.token_files import TokenFile, write_token_file
from recipe.tokenization.train import train_tokenizer
from recipe.training import training
from recipe.training.prepare import prepare
from recipe.training.sample_prompts import SamplePrompts
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

# With dropout, so that one random number more or less between two steps changes the losses.
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 64,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
}

VALUES = {
    "block_size": 32,
    "global_batch_size": 4,
    "per_device_train_batch_size": 2,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": False,
    "torch_compile": False,
}

# The documents of the corpus, as stage 04 counts them.
SOURCES = {
    "first": {"first_document": 0, "documents": 150},
    "clean": {"first_document": 150, "documents": 50},
}

GENERATION = {"prompts": ["今日は", "彼女は"], "max_new_tokens": 5, "do_sample": True, "seed": 1}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Folder with a tokenizer and a token file."""
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = train_tokenizer(sentences(2000, 1), {"vocab_size": 400}).tokenizer
    tokenizer.save_pretrained(folder)
    write_token_file(folder / "train", (document_ids(tokenizer, text) for text in sentences(200, 2)), 400)
    return folder


def plan_of(folder, config):
    """The plan of a training in this process alone, as the launcher writes it."""
    plan = {"recipe": "x", "config": config, "deepspeed": None, "folder": str(folder), "ranks": 1}
    plan |= {"fsdp": False, "tensor_parallel": 1, "new_optimizer": False}
    return plan | {"host": platform.node(), "parent": os.getpid()}


@pytest.fixture
def train(corpus, tmp_path, monkeypatch):
    """Train the tiny model with changed values; returns (figures, rows of metrics.jsonl, folder)."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for name in ("TENSORBOARD_LOGGING_DIR", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    # Forget what an earlier test has compiled in this process.
    torch._dynamo.reset()
    counters.clear()

    def run(name="run", model=GPT2, valid=None, **changes):
        """valid: changes every second block of the validation side."""
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)  # the same name again continues
        values = VALUES | changes
        config = {"pretrain": values, "generation": GENERATION, "model": model}
        run = prepare(plan_of(folder, config), "pretrain")
        tokenizer = AutoTokenizer.from_pretrained(corpus)
        pad, file, phases = tokenizer.pad_token_id, TokenFile(corpus / "train"), []
        samples = PackedBlocks(file, 32, pad, run.arguments.seed)
        blocks = [samples[number] for number in range(4)]
        if valid:
            blocks[1::2] = map(valid, blocks[1::2])
        if values.get("phases"):
            phases = phases_of(values, values["max_steps"])
            layout = samples_of(values)[0], longest_block(values), pad, run.arguments.seed
            samples = phased_blocks(file, phases, *layout, SOURCES, {name: {} for name in SOURCES})
        model = build_model(model, tokenizer, run.choice.attention, run.arguments.seed)
        prompts = {prompt: prompt_ids(tokenizer, prompt) for prompt in GENERATION["prompts"]}
        sampling = SamplePrompts(run.settings.sample_steps, prompts, GENERATION, tokenizer, folder)
        figures = training.train_model(
            run, model, tokenizer, samples, blocks, bytes_per_token=3.0, sampling=sampling, phases=phases
        )
        return figures, rows_of(folder / "metrics.jsonl"), folder

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def scored(monkeypatch):
    """How many positions trl computes the output and its loss for: a number for each forward pass."""
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    numbers = []
    function = utils._ChunkedLogProbFunction

    class Noted:
        @staticmethod
        def apply(hidden, *rest):
            numbers.append(len(hidden))
            return function.apply(hidden, *rest)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Noted)
    # As trl has it, whatever a trainer has set in this process before.
    monkeypatch.setattr(utils, "_use_triton", chunked_logprob._use_triton)
    return numbers


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses_of(rows):
    return [row["loss"] for row in rows if "loss" in row]


def tiny_qwen3():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        Qwen3Config(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=True,
        )
    )
