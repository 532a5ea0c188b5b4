"""The keys of a training file: their types, their values, and what they need."""

import dataclasses
import importlib.util

import pytest
from recipe.config import training
from recipe.config.settings import Settings
from recipe.config.training import check_boards
from recipe.project import Refused
from refusal import refusal


def test_board_without_its_library_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(Refused, match=r"pretrain.json: report_to: wandb is not installed.*pip install wandb"):
        check_boards(["wandb"], "pretrain.json")
    assert check_boards("none", "x") == check_boards(None, "x") == ["tensorboard"]


def test_json_types_are_those_of_the_dataclass():
    types = training.TRAINING
    assert types["block_size"] == "int" and types["sample_steps"] == "int|list|null"
    assert types["muon_learning_rate"] == "float|null" and training.TUNING == {"lora": "dict|null"}
    assert set(training.PRETRAINING) == {"initial_model", "initial_revision", "phases", "fp8"}
    everywhere = training.TRAINING | training.PRETRAINING | training.TUNING
    assert list(everywhere.values()).count("any") == 0
    assert set(everywhere) == {field.name for field in dataclasses.fields(Settings)}


def schedule(kind, options=None, **values):
    """A change of the schedule in pretrain.json."""
    values = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": options} | values
    return lambda config: config["pretrain"].update(values)


def spikes(**values):
    """A change of the rule for spikes in pretrain.json."""
    return lambda config: config["pretrain"].update(spikes=values)


def lora(config, **values):
    """Tune an adapter, with AdamW."""
    config["finetune"].pop("muon_learning_rate", None)
    config["finetune"]["lora"] = values


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["pretrain"].update(lr_scheduler_type="cosin"), ["lr_scheduler_type", "'cosine'"]),
        (lambda c: c["pretrain"].update(global_batch_size=0), ["global_batch_size: 0", "from 1 to"]),
        (lambda c: c["pretrain"].update(gradient_accumulation_steps=2), ["global_batch_size"]),
        (lambda c: c["pretrain"].update(bf16=True, fp16=True), ["bf16 and fp16"]),
        (
            lambda c: c["pretrain"].update(attn_implementation="flash"),
            ["attn_implementation", "flash_attention_2"],
        ),
        (lambda c: c["pretrain"].update(optim="adafactor"), ["optim: muon_learning_rate"]),
        (schedule("constant", warmup_steps=10), ["warmup_steps: 10", "constant_with_warmup"]),
        (lambda c: c["pretrain"].update(learning_rate=-1), ["learning_rate: -1", "from 0 to 100"]),
        (lambda c: c["pretrain"].update(adam_beta2=1.5), ["adam_beta2: 1.5", "at most"]),
        (lambda c: c["pretrain"].update(logging_steps=0), ["logging_steps: 0"]),
        (
            lambda c: (
                c["finetune"].pop("muon_learning_rate", None),
                c["finetune"].update(lora={"quantization": None}),
            ),
            ["lora", 'Write {"r": 16}'],
        ),
        (schedule("polynomial", warmup_steps=9, max_steps=9), ["warmup_steps: 9", "divide by zero"]),
        (schedule("cosine_with_min_lr"), ["lr_scheduler_kwargs", "one floor", "min_lr_rate"]),
        (schedule("cosine_with_min_lr", {"min_lr": 1, "min_lr_rate": 0.1}), ["one floor"]),
        (schedule("cosine_with_min_lr", {"min_lr": 0.009}), ["min_lr: 0.009", "below 0.009"]),
        (schedule("cosine", {"min_lr": 1e-5}), ["min_lr: cosine has no such option", "num_cycles"]),
        (schedule("warmup_stable_decay"), ["num_decay_steps: null", '"num_decay_steps": 1000']),
        (schedule("warmup_stable_decay", {"num_decay_steps": 2200}), ["num_decay_steps: 2200", "20", "1000"]),
        (schedule("linear", "x"), ["lr_scheduler_kwargs", "expected an object"]),
        (lambda c: c["pretrain"].update(report_to=["wanb"]), ["report_to", "'wandb'"]),
        (lambda c: c["pretrain"].update(sample_steps=[10, 0]), ["sample_steps: [10, 0]", "1 or more"]),
        (lambda c: c["pretrain"].update(z_loss=-1e-4), ["z_loss: -0.0001"]),
        (
            lambda c: c["pretrain"].update(label_smoothing_factor=0.1),
            ["label_smoothing_factor", "second time"],
        ),
        (lambda c: c["finetune"].update(auto_find_batch_size=True), ["finetune.json: auto_find_batch_size"]),
        (
            lambda c: c["pretrain"].update(load_best_model_at_end=True),
            ["load_best_model_at_end", "last step"],
        ),
        (
            lambda c: c["pretrain"].update(use_liger_kernel=True, z_loss=1e-4),
            ["pretrain.json: use_liger_kernel", "no z_loss", "Remove one"],
        ),
        (
            lambda c: c["pretrain"].update(liger_kernel_config={"rope": False}),
            ["liger_kernel_config", "does nothing with use_liger_kernel false"],
        ),
        (lambda c: c["pretrain"].update(bf16_full_eval=True), ["bf16_full_eval", "rounded"]),
        (
            lambda c: c["pretrain"].pop("eval_strategy"),
            ["eval_steps: 500 does nothing", 'eval_strategy "no"', 'Add eval_strategy: "steps"'],
        ),
        (lambda c: c["pretrain"].update(save_strategy="no"), ["save_steps: 500", 'save_strategy "no"']),
        (lambda c: c["pretrain"].update(logging_strategy="epoch"), ["logging_steps: 10", "epoch"]),
        (
            lambda c: (c["pretrain"].pop("save_steps"), c["pretrain"].update(save_strategy="epoch")),
            ["save_strategy", "expected steps or no"],
        ),
        (
            lambda c: c["pretrain"].update(torch_compile=True, torch_compile_mode="reduce-overhead"),
            ["torch_compile_mode", "reduce-overhead", "expected", "max-autotune-no-cudagraphs"],
        ),
        (lambda c: c["pretrain"].update(torch_compile_mode="default"), ["torch_compile_mode", "null"]),
        (
            lambda c: c["pretrain"].update(activation_checkpointing_kwargs={"use_reentrant": False}),
            ["activation_checkpointing_kwargs does nothing without"],
        ),
        (
            lambda c: c["pretrain"].update(
                activation_checkpointing=True, activation_checkpointing_kwargs={"every_n_layer": 2}
            ),
            ["activation_checkpointing_kwargs: every_n_layer", "Did you mean 'every_n_layers'"],
        ),
        (
            lambda c: c["pretrain"].update(
                activation_checkpointing=True, activation_checkpointing_kwargs='{"every_n_layers": 2}'
            ),
            ["activation_checkpointing_kwargs: ", "expected an object"],
        ),
        (
            lambda c: c["pretrain"].update(
                activation_checkpointing=True, activation_checkpointing_kwargs={"every_n_layers": 0}
            ),
            ["activation_checkpointing_kwargs: every_n_layers: 0", "1 or more"],
        ),
        (lambda c: c["pretrain"].update(muon_learning_rate=0), ["muon_learning_rate: 0", "more than 0"]),
        (
            lambda c: c["pretrain"].update(embedding_learning_rate=0),
            ["embedding_learning_rate: 0", "more than 0"],
        ),
        (
            lambda c: (c["pretrain"].pop("muon_learning_rate"), c["pretrain"].update(optim="galore_adamw")),
            ["optim: galore_adamw", "adamw_torch_fused"],
        ),
        (
            lambda c: (c["pretrain"].pop("muon_learning_rate"), c["pretrain"].update(optim="sgd")),
            ["adam_beta2: optim sgd does not read it"],
        ),
        (
            lambda c: (
                c["pretrain"].pop("muon_learning_rate"),
                c["pretrain"].update(embedding_learning_rate=0.1),
            ),
            ["embedding_learning_rate: only Muon reads it"],
        ),
        (
            lambda c: (
                c["model"].update(tie_word_embeddings=True),
                c["pretrain"].update(embedding_learning_rate=0.1),
            ),
            ["pretrain.json: embedding_learning_rate: the output shares", '"tie_word_embeddings": false'],
        ),
        (schedule("greedy"), ["lr_scheduler_type: greedy", "cosine"]),
        (spikes(deviation=6), ["pretrain.json: spikes: deviation: unknown key", "'deviations'"]),
        (spikes(deviations=1), ["spikes: deviations: 1", "3 or more"]),
        (spikes(skip=50), ['skip: 50 does nothing without "back"', '"back": 1']),
        (spikes(back=3), ["back: 3", "save_total_limit keeps only 2"]),
        (
            lambda c: (
                c["pretrain"].pop("save_steps"),
                c["pretrain"].update(save_strategy="no", spikes={"back": 1}),
            ),
            ["back: 1", 'save_strategy "no"'],
        ),
        (lambda c: lora(c, ranks=4), ["finetune.json: lora: ranks: unknown key"]),
        (lambda c: lora(c, r=0), ["lora.r: 0", "more than 0"]),
        (lambda c: lora(c, quantization="int8"), ['lora.quantization: "int8"', "nf4"]),
        (lambda c: c["finetune"].update(lora={"r": 4}), ["muon_learning_rate", "or lora"]),
        (lambda c: (lora(c, r=4), c["finetune"].update(z_loss=1e-4)), ["finetune.json: z_loss", "or lora"]),
    ],
)
def test_a_fault_is_named_with_the_way_out(change, words):
    message = refusal(change)
    assert all(word in message for word in words), message


def test_steps_after_the_last_one_are_said():
    values = {"eval_steps": 20, "save_steps": 10, "sample_steps": [5, 11], "logging_steps": 0.5}
    lines = training.unreached_steps(values, 10, "x.json")
    assert [line.split(": ")[2] for line in lines] == ["eval_steps", "sample_steps"]
    assert "x.json: eval_steps: 20, but the run has 10 steps: the validation loss" in lines[0]
    assert training.unreached_steps(values, 20, "x.json") == []
