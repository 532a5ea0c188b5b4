"""The shipped recipes: each loads, builds at its published size, and holds the figures of its original."""

import json
import re

import pytest
import torch
from recipe.config import launch, tokenizer, training
from recipe.config.chat_templates import chat_template
from recipe.config.recipe import load_recipe, recipes
from recipe.model.build import build_model, parameter_count
from recipe.project import CONFIGS, Refused
from recipe.run import fitting, preflight
from recipe.run.launch_options import Launch
from recipe.run.memory import shape_of
from recipe.tokenization.train import expected_memory

OWN = ("tiny", "small", "colab-t4")  # they follow no published system
REFERENCES = [name for name in recipes() if name not in OWN]
NEWER = {  # what the later Mistrals share
    "learning_rate": 3e-4,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "warmup_steps": 1000,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-8,
    "num_train_epochs": 1,
    "global_batch_size": 240,
    "block_size": 1024,
}
FIRST = {
    "learning_rate": 6e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1000,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-4,
    "num_train_epochs": 1,
    "global_batch_size": 256,
    "per_device_train_batch_size": 4,
    "block_size": 1024,
    "dataloader_num_workers": 8,
    "logging_steps": 100,
    "eval_steps": 5000,
    "save_steps": 5000,
    "save_total_limit": 2,
}
PRETRAINING = {
    "mistral-300m": FIRST,
    "mistral-300m-qlora": FIRST,
    "mistral-300m-v2": NEWER | {"per_device_train_batch_size": 12},
    "mistral-39m": NEWER,
    "mistral-2b": NEWER,
    "mistral-3b": NEWER,
    "gpt2-medium-aozora": {
        "initial_model": "rinna/japanese-gpt2-medium",
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 100,
        "weight_decay": 0.1,
        "num_train_epochs": 3,
        "global_batch_size": 128,
        "per_device_train_batch_size": 16,
        "block_size": 512,
        "dataloader_num_workers": 4,
        "logging_steps": 85,
        "eval_steps": 85,
        "save_steps": 85,
        "save_total_limit": 3,
        "ddp_find_unused_parameters": False,
    },
    "gpt2-small": {
        "learning_rate": 1e-6,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "num_train_epochs": 3,
        "global_batch_size": 3,
        "per_device_train_batch_size": 3,
        "block_size": 512,
        "logging_steps": 100,
        "save_steps": 1000,
    },
    "gpt2-xl": {
        "learning_rate": 3e-4,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "num_train_epochs": 10,
        "global_batch_size": 528,
        "per_device_train_batch_size": 3,
    },
}


class Vocabulary:
    """What a model takes from a tokenizer: the number of tokens and the special ids."""

    def __init__(self, size, ids):
        self.size = size
        self.pad_token_id, self.bos_token_id, self.eos_token_id = (
            ids.get(f"{name}_token_id") for name in ("pad", "bos", "eos")
        )

    def __len__(self):
        return self.size


def built(recipe, size):
    """The recipe's model without its weights, at a vocabulary of `size`."""
    values = load_recipe(recipe)
    with torch.device("meta"):
        return build_model(
            values["model"], Vocabulary(size, tokenizer.special_ids(values["tokenizer"])), "sdpa", 0
        )


def test_every_folder_is_known_here():
    assert set(PRETRAINING) == set(REFERENCES)


# The vocabulary is that of the own tokenizer, with two exceptions: that of rinna is published (32,000), and
# two originals gave their models the 50,257 tokens of GPT-2 although their tokenizers had 50,000.
@pytest.mark.parametrize(
    ("recipe", "size", "positions", "parameters"),
    [
        ("mistral-300m", 50_000, 4096, 354_894_848),
        ("mistral-300m", 50_257, 4096, 355_421_184),
        ("mistral-300m-qlora", 50_000, 4096, 354_894_848),
        ("mistral-300m-v2", 32_000, 8192, 318_030_848),
        ("mistral-39m", 32_000, 4096, 48_503_296),
        ("mistral-2b", 32_000, 4096, 2_148_850_944),
        ("mistral-3b", 50_257, 4096, 3_298_352_640),
        ("mistral-3b", 50_000, 4096, 3_297_036_800),
        ("gpt2-medium-aozora", 32_000, 1024, 336_128_000),
        ("gpt2-small", 30_000, 1024, 108_882_432),
        ("gpt2-xl", 50_000, 1024, 1_557_200_000),
        # Our own: the figures of configs/README.md.
        ("tiny", 4_000, 1024, 2_490_560),
        ("small", 32_000, 2048, 109_531_392),
        ("colab-t4", 16_000, 2048, 33_367_552),
    ],
)
def test_a_model_has_the_published_size(recipe, size, positions, parameters):
    if size != 50_257:
        assert tokenizer.vocabulary_size(load_recipe(recipe)["tokenizer"]) in (size, None)
    model = built(recipe, size)
    assert parameter_count(model) == parameters
    assert model.config.max_position_embeddings == positions
    assert all(parameter.is_meta for parameter in model.parameters())


def test_special_ids_of_the_model_are_the_tokenizers():
    assert built("mistral-300m", 50_000).config.eos_token_id == 3
    ids = tokenizer.special_ids(load_recipe("mistral-300m")["tokenizer"])
    assert ids == {"pad_token_id": 0, "unk_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    ids = tokenizer.special_ids(load_recipe("gpt2-xl")["tokenizer"])
    assert ids == {"pad_token_id": 2, "unk_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("recipe", REFERENCES)
def test_pretraining_has_the_figures_of_the_original(recipe):
    values = load_recipe(recipe)["pretrain"]
    assert {key: values.get(key) for key in PRETRAINING[recipe]} == PRETRAINING[recipe]


@pytest.mark.parametrize("recipe", recipes())
def test_what_the_hardware_decides_is_left_to_it(recipe):
    """One recipe runs on a T4 (fp16, SDPA), on a 4090 (bf16, FlashAttention-2) and on a CPU."""
    values = load_recipe(recipe)
    for file in training.training_files(values):
        assert not {"bf16", "fp16", "torch_compile", "attn_implementation", "optim"} & values[file].keys()


@pytest.mark.parametrize("recipe", ["small", "colab-t4"])
def test_what_llama_cpp_and_others_read(recipe):
    """A tokenizer that llama.cpp computes exactly, an architecture without code of its own; licences."""
    values = load_recipe(recipe)
    assert values["tokenizer"]["kind"] == "bpe" and values["model"]["model_type"] == "qwen3"
    assert all(source["licence"] for source in values["dataset"]["sources"].values())
    # Reading stops there: neither data set is fetched as a whole.
    assert all(source["maximum_megabytes"] <= 5000 for source in values["dataset"]["sources"].values())
    assert values["finetune"]["block_size"] <= values["model"]["max_position_embeddings"]


def test_colab_t4_stays_within_the_limits_of_its_host():
    """12 GB of memory in stage 03, 78 GB of disk: what is computed or estimated before the start."""
    values = load_recipe("colab-t4")
    assert expected_memory(values["tokenizer"]) < 2e9
    shape = shape_of(values["model"], tokenizer.vocabulary_size(values["tokenizer"]))
    t4 = next(device for device in fitting.PROFILES if "T4" in device.name)
    setting = fitting.setting_of(values["pretrain"], t4, Launch())
    disk = preflight.training_disk(shape, setting, values["pretrain"], values["pretrain"]["max_steps"])
    assert setting.precision == "fp16" and disk < 1.5e9
    assert values["dataset"]["disk_gigabytes"] * 1e9 + disk < 15e9
    # At most a tenth of the training is repeated after a cut.
    assert values["pretrain"]["save_steps"] * 10 <= values["pretrain"]["max_steps"]


# (micro-batch, accumulation) on the ranks of the originals.
@pytest.mark.parametrize(
    ("recipe", "ranks", "expected"),
    [
        ("mistral-300m", 1, (4, 64)),
        ("mistral-300m-v2", 1, (12, 20)),
        ("gpt2-medium-aozora", 1, (16, 8)),
        ("gpt2-medium-aozora", 4, (16, 2)),
        ("gpt2-medium-aozora", 8, (16, 1)),
        ("gpt2-small", 1, (3, 1)),
        ("gpt2-xl", 8, (3, 22)),
        ("mistral-2b", 8, (2, 15)),
        ("mistral-3b", 8, (1, 30)),
    ],
)
def test_batches_divide_as_in_the_original(recipe, ranks, expected):
    values = load_recipe(recipe)["pretrain"]
    most = values["per_device_train_batch_size"]
    assert launch.batch_layout(values["global_batch_size"], most, ranks) == expected


def test_batches_divide_on_other_numbers_of_gpus_as_the_readmes_say():
    values = load_recipe("mistral-300m-v2")["pretrain"]
    with pytest.raises(Refused, match="do not divide into 8 ranks"):
        launch.batch_layout(values["global_batch_size"], 12, 8)
    assert launch.batch_layout(values["global_batch_size"], 10, 8) == (10, 3)
    assert launch.batch_layout(3, 3, 3) == (1, 1)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (
            "mistral-300m",
            {
                "max_new_tokens": 256,
                "top_p": 0.95,
                "top_k": 50,
                "temperature": 0.9,
                "no_repeat_ngram_size": 2,
            },
        ),
        (
            "gpt2-medium-aozora",
            {"max_new_tokens": 100, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2},
        ),
        ("gpt2-small", {"max_new_tokens": 128, "do_sample": False, "repetition_penalty": 1.1}),
        ("gpt2-xl", {"seed": 42, "do_sample": True, "num_return_sequences": 5}),
    ],
)
def test_generation_has_the_figures_of_the_original(recipe, expected):
    values = load_recipe(recipe)["generation"]
    assert {key: values.get(key) for key in expected} == expected


def test_tokenizers_are_of_the_kinds_of_the_originals():
    found = {name: load_recipe(name)["tokenizer"] for name in REFERENCES}
    kinds = {name: (values["kind"], tokenizer.vocabulary_size(values)) for name, values in found.items()}
    assert kinds == {
        "mistral-300m": ("unigram", 50_000),
        "mistral-300m-qlora": ("unigram", 50_000),
        "mistral-300m-v2": ("unigram", 32_000),
        "mistral-39m": ("unigram", 32_000),
        "mistral-2b": ("unigram", 32_000),
        "mistral-3b": ("unigram", 50_000),
        "gpt2-medium-aozora": ("published", None),
        "gpt2-small": ("byte-level-bpe", 30_000),
        "gpt2-xl": ("word-bpe", 50_000),
    }
    assert tokenizer.special_tokens(found["gpt2-small"]) == {
        "pad_token": "<pad>",
        "unk_token": None,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
    }
    assert (found["gpt2-xl"]["segmenter"], found["gpt2-xl"]["limit_alphabet"]) == ("jumanpp", 8000)


def test_the_prompts_of_tuning_hold_line_breaks_and_no_marks_that_are_text():
    """The original had a literal backslash-n, and [SEP], which was no token."""
    values = load_recipe("mistral-300m")["instruction"]
    template = chat_template(values["template"], values["system"])
    assert "[SEP]" not in template
    assert "\ufeff" not in json.dumps(values, ensure_ascii=False)
    assert "日本で一番高い山は?" in load_recipe("mistral-300m")["generation"]["questions"]


def test_gpt2_small_has_a_variant_with_sentencepiece():
    """The command that its README gives."""
    changes = ["tokenizer.kind=unigram", "tokenizer.unk_token=<unk>"]
    values = load_recipe("gpt2-small", changes)["tokenizer"]
    assert tokenizer.vocabulary_size(values) == 30_000
    with pytest.raises(Refused, match="unk_token"):
        load_recipe("gpt2-small", changes[:1])


@pytest.mark.parametrize("recipe", recipes())
def test_a_readme_names_only_what_is_there(recipe):
    """Its commands are for this recipe, its overrides are known keys, its DeepSpeed files exist."""
    text = (CONFIGS / recipe / "README.md").read_text("utf-8")
    named = set(re.findall(r"--recipe ([\w-]+)", text))
    assert recipe in named and named <= set(recipes())
    overrides = [change.strip("'") for change in re.findall(r"--set ('[^']+'|\S+)", text)]
    load_recipe(recipe, [change.rstrip("`.,;)") for change in overrides])
    for name in re.findall(r"--deepspeed (\w+)", text):
        assert launch.check_deepspeed(name).is_file()
