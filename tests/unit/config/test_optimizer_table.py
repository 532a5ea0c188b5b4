"""The table of optimizers: each entry against the real optimizer, and what reads the entries."""

from collections import defaultdict

import pytest
import torch
from recipe.config import optimizers
from recipe.config.launch import check_launch
from recipe.config.optimizers import DEFAULT, OPTIMIZERS, Optimizer, check_optimizer_hardware
from recipe.config.recipe import check_recipe, load_recipe
from recipe.config.settings import Settings
from recipe.hardware import Hardware
from recipe.model import optimizers as ours
from recipe.model.build import is_outer
from recipe.project import Refused
from recipe.run.fitting import PROFILES, setting_of
from recipe.run.launch_options import Launch
from recipe.run.memory import memory, shape_of
from shapes import SMALL, read
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

A100 = Hardware("cuda", "A100", (8, 0), (2, 13), True, (2,), True)
CPU = Hardware("cpu", "CPU", (0, 0), (2, 13), True, (), True)
ON_CPU = [name for name, entry in OPTIMIZERS.items() if not entry.bitsandbytes]
BATCHES = {"global_batch_size": 8, "per_device_train_batch_size": 4, "block_size": 64}


def group_of(name, parameter):
    if parameter.ndim == 1:
        return "vectors"
    return ("output" if "lm_head" in name else "embeddings") if is_outer(name) else "matrices"


def built(name, model, folder):
    entry = OPTIMIZERS[name]
    chosen = {} if entry.builder else {"optim": name}  # transformers knows no optimizer of ours
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, weight_decay=0.1, **chosen)
    if entry.builder:
        return getattr(ours, entry.builder)(model, Settings(1, 1, muon_learning_rate=0.02), arguments)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    return kind(model.parameters(), **options)


@pytest.mark.parametrize("name", ON_CPU)
def test_an_entry_is_what_the_real_optimizer_holds_after_a_step(name, tmp_path):
    shape = {"vocab_size": 400, "n_embd": 256, "n_layer": 1, "n_head": 4, "tie_word_embeddings": False}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **shape))
    optimizer = built(name, model, tmp_path)
    assert type(optimizer).__name__ == OPTIMIZERS[name].reported
    model(input_ids=torch.arange(30)[None], labels=torch.arange(30)[None]).loss.backward()
    optimizer.step()
    held, counts = defaultdict(float), defaultdict(int)
    states = {id(p): s for part in getattr(optimizer, "parts", [optimizer]) for p, s in part.state.items()}
    for parameter_name, parameter in model.named_parameters():
        group = group_of(parameter_name, parameter)
        counts[group] += parameter.numel()
        tensors = states.get(id(parameter), {}).values()
        held[group] += sum(tensor.nbytes for tensor in tensors if torch.is_tensor(tensor))
    for group, expected in OPTIMIZERS[name].state._asdict().items():
        assert held[group] / counts[group] == pytest.approx(expected, abs=0.03), group


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("sgd", 0),
        ("adafactor", 0.02),
        ("rmsprop", 4),
        ("paged_lion_32bit", 4),
        ("adamw_torch", 8),
        ("paged_adamw_32bit", 8),
    ],
)
def test_the_preflight_counts_the_optimizer_that_is_chosen(optimizer, expected):
    """It once counted every one as AdamW."""
    values = {key: value for key, value in read("mistral-300m", "pretrain").items() if "muon" not in key}
    shape = shape_of(read("mistral-300m", "model"), 50_000)
    gpu = PROFILES[-1]
    parts = memory(shape, setting_of(values | {"optim": optimizer}, gpu, Launch()))
    assert parts["optimizer"] / shape.parameters == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("name", [name for name, entry in OPTIMIZERS.items() if entry.bitsandbytes])
def test_bitsandbytes_needs_a_gpu_and_the_library(name):
    for hardware, words in ((CPU, "needs an NVIDIA GPU; this is CPU"), (A100, "setup.sh --extra")):
        with pytest.raises(Refused, match=f"pretrain.json: optim: {name} .*{words}.*Write adamw_torch_fused"):
            check_optimizer_hardware(hardware, {"optim": name}, "pretrain.json")
    with_library = Hardware("cuda", "A100", (8, 0), (2, 13), True, (2,), True, True)
    check_optimizer_hardware(with_library, {"optim": name}, "pretrain.json")
    check_optimizer_hardware(CPU, {"muon_learning_rate": 0.02}, "pretrain.json")


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        ({"optim": "adafactor"}, {"fsdp": True}, "optim: adafactor does not work under --fsdp"),
        ({"optim": "lion_8bit"}, {"tensor_parallel": 2}, "lion_8bit does not work under --tensor-parallel"),
        ({"optim": "sgd"}, {"deepspeed": "zero2_offload"}, "sgd does not work under --deepspeed zero2_off"),
        ({"muon_learning_rate": 0.02}, {"deepspeed": "zero1"}, "Muon needs matrices"),
    ],
)
def test_an_optimizer_is_refused_where_it_does_not_work(values, options, words):
    arguments = {"deepspeed": None, "ranks": 2} | options
    with pytest.raises(Refused, match=rf"pretrain.json: .*{words}"):
        check_launch(BATCHES | values, "pretrain", **arguments)
    check_launch(BATCHES | {"optim": "adamw_torch"}, "pretrain", **arguments)


def test_a_new_optimizer_is_one_entry_and_its_builder(monkeypatch):
    """A name of ours for the key ``optim``: accepted, checked for stray keys, counted."""
    entry = Optimizer("Adan", optimizers.everywhere(12), keys=optimizers.BETAS, builder="build_adan")
    monkeypatch.setitem(OPTIMIZERS, "adan", entry)
    recipe = load_recipe("tiny")
    del recipe["pretrain"]["muon_learning_rate"]
    recipe["pretrain"]["optim"] = "adan"
    check_recipe(recipe, "configs/x")
    recipe["pretrain"]["adam_epsilon"] = 1e-6
    with pytest.raises(Refused, match="adam_epsilon: optim adan does not read it"):
        check_recipe(recipe, "configs/x")
    shape = shape_of(SMALL, 1000)
    setting = setting_of(BATCHES | {"block_size": 64, "optim": "adan"}, PROFILES[-1], Launch())
    assert memory(shape, setting)["optimizer"] == 12 * shape.parameters


def test_the_default_is_the_trainers(tmp_path):
    assert TrainingArguments(output_dir=str(tmp_path), use_cpu=True).optim == DEFAULT
