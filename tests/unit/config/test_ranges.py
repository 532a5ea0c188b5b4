"""Values out of range: what the loader accepts, later stages accept; what they refuse, it refuses by name."""

import copy
import json
import math

import pytest
import torch
from conftest import sentences
from recipe.config import generation, model, training
from recipe.config.keys import ELSEWHERE, known_keys
from recipe.config.recipe import check_recipe, load_recipe, recipes
from recipe.evaluation.generation import generate_all, generation_config
from recipe.model.build import build_model
from recipe.project import Refused
from recipe.tokenization.train import train_tokenizer
from recipe.training.prepare import prepare
from refusal import tiny
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

VALUES = (-1, -0.5, 0, 0.5, 1, 1.5, 2, 3, "silly", "", True, None, [], {}, math.inf, -math.inf, math.nan)
VALUES += (10**400, 1e300)


def accepted(config):
    """Whether the loader accepts a recipe; a refusal names a file."""
    try:
        check_recipe(config, "configs/x")
    except Refused as error:
        assert ".json" in str(error), str(error)
        return False
    return True


def changed(config, path, value):
    """A copy of the recipe with one value changed; path: the keys from the file on."""
    result = copy.copy(config)
    section = result
    for key in path[:-1]:
        section[key] = copy.copy(section.get(key) or {})
        section = section[key]
    section[path[-1]] = copy.copy(value)  # transformers writes into what it is given
    return result


def paths(values, path=()):
    """The keys of nested objects, from the file on."""
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from paths(value, (*path, key))


@pytest.mark.parametrize("recipe", recipes())
def test_every_key_of_a_recipe_refuses_infinity_nan_and_a_value_of_another_type(recipe):
    """Walk over all keys of all files. A number is neither infinite nor negative in any of them."""
    config = load_recipe(recipe)
    for path in paths(config):
        if len(path) == 1:
            continue
        for value in VALUES:
            ok = accepted(changed(config, path, value))
            if isinstance(value, float) and not math.isfinite(value):
                assert not ok, (path, value)
            if isinstance(value, int | float) and value == -1 and path[-1] != "max_steps":
                assert not ok, (path, value)
            if isinstance(value, int | float) and value > 1e12:
                assert not ok, (path, value)


SIZES = ("size", "head_dim", "layer", "positions", "window", "embd", "beams", "learning_rate", "temperature")


@pytest.mark.parametrize("recipe", recipes())
def test_a_size_above_every_model_is_refused(recipe):
    """Walk over all keys. A typo such as one zero too many in a size ends in the refusal of its key."""
    config = load_recipe(recipe)
    for path in paths(config):
        if any(word in path[-1] for word in SIZES) and path[-1] != "minhash":
            for value in (10**10, 1e10):
                assert not accepted(changed(config, path, value)), path


def accepted_values(config, file, types):
    """(key, file's values) for each value of each key that the loader accepts."""
    for key in types:
        for value in VALUES:
            new = changed(config, (file, key), value)
            if accepted(new):
                yield key, value, new


@pytest.fixture(scope="module")
def fast():
    return train_tokenizer(sentences(500, 1), {"vocab_size": 400}).tokenizer


def test_generation_accepts_what_the_loader_accepts(fast):
    config = tiny()
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
    small = build_model(config["model"] | shape, fast, "sdpa", 0)
    config["generation"]["max_new_tokens"] = 3
    tried = set()
    for key, value, new in accepted_values(config, "generation", generation.NATIVE):
        values = {k: v for k, v in new["generation"].items() if k[-3:] != "_id"}
        assert generate_all(small, fast, [[5, 6]], generation_config(values, fast), 0), (key, value)
        tried.add(key)
    assert {"temperature", "top_p", "num_beams", "min_p", "typical_p", "top_h"} <= tried


@pytest.mark.parametrize("kind", sorted(known_keys()["model"]))
def test_a_model_can_be_built_from_what_the_loader_accepts(kind):
    config = tiny()
    old = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
    new = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config["model"] = {"model_type": kind} | (old if kind == "gpt2" else new)
    if "num_key_value_heads" in known_keys()["model"][kind]:
        config["model"]["num_key_value_heads"] = 2
    if kind in model.OWN_TOKENIZER:
        config["tokenizer"] = {"kind": "published", "published": "x"}
    assert accepted(config)
    for key, value, changed_config in accepted_values(config, "model", known_keys()["model"][kind]):
        if key == "model_type":
            continue
        values = {k: v for k, v in changed_config["model"].items() if k != "model_type"} | {"vocab_size": 400}
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
        assert made.num_parameters() > 0, (key, value)


def test_training_arguments_accept_what_the_loader_accepts(tmp_path, monkeypatch):
    for name in ("TENSORBOARD_LOGGING_DIR", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    native = [key for key in known_keys()["training_arguments"] if key not in ELSEWHERE]
    hardware = {"bf16", "fp16", "torch_compile", "tf32", "attn_implementation"}  # chosen by what is there
    hardware |= {"report_to"}  # libraries that may be missing
    hardware |= {"global_batch_size", "per_device_train_batch_size"}  # the dry run divides one by the other
    plan = {"recipe": "x", "deepspeed": None, "ranks": 1, "folder": str(tmp_path), "host": "", "parent": 0}
    plan |= {"fsdp": False, "tensor_parallel": 1, "new_optimizer": False}
    tried = set()
    for key, value, new in accepted_values(tiny(), "pretrain", [*native, *training.TRAINING]):
        if key in hardware:
            continue
        try:
            prepare(plan | {"config": new}, "pretrain")
        except Exception as error:
            raise AssertionError(f"{key}: {json.dumps(value)}: {error}") from error
        tried.add(key)
    assert {"learning_rate", "warmup_steps", "save_total_limit", "seed", "ddp_timeout"} <= tried


@pytest.mark.parametrize(
    ("file", "key", "value", "words"),
    [
        ("generation", "temperature", 0, "temperature: 0, expected more than 0 (for the most probable token"),
        ("generation", "top_p", 2, "top_p: 2, expected a number from 0 to 1"),
        ("generation", "stop_strings", "。", "expected list|null"),
        ("generation", "stop_strings", [""], "expected a list of texts, none of them empty"),
        ("generation", "penalty_alpha", 0.6, "penalty_alpha: stages 07 and 15 and chat.py do not support it"),
        ("generation", "min_new_tokens", 97, "expected at most max_new_tokens, 96"),
        ("model", "hidden_act", "silly", 'hidden_act: "silly", expected one of gelu'),
        ("model", "hidden_act", "sillu", "Did you mean 'silu'?"),
        ("model", "head_dim", 63, "63 numbers in an attention head, expected an even number"),
        ("model", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "factor: missing"),
        ("dataset", "valid_share", 0, "valid_share: 0, expected a number above 0 and below 1"),
        ("dataset", "minimum_characters", math.nan, "minimum_characters: nan, expected a finite number"),
        ("tokenizer", "character_coverage", 0.9, "character_coverage: 0.9, expected a number from 0.98 to 1"),
        ("pretrain", "max_steps", 0, "max_steps: 0, expected 1 or more"),
        ("pretrain", "eval_steps", 1.5, "eval_steps: 1.5, expected more than 0; from 1 on a whole number"),
        ("pretrain", "learning_rate", math.inf, "learning_rate: inf, expected a finite number"),
        ("pretrain", "dataloader_prefetch_factor", 2, "needs workers. Add dataloader_num_workers"),
        (
            "model",
            "hidden_size",
            10**11,
            "hidden_size: 100000000000, expected a whole number from 1 to 1,000,0",
        ),
        ("tokenizer", "vocab_size", 10**10, "expected a whole number from 1 to 10,000,000"),
        ("pretrain", "learning_rate", 1e10, "learning_rate: 10000000000.0, expected a number from 0 to 100"),
        ("pretrain", "max_steps", 10**10, "expected 1 or more, at most 1,000,000,000"),
        ("pretrain", "warmup_steps", 10**400, "expected a number of at most 1,000,000,000,000"),
        (
            "dataset",
            "rules",
            {"web": {"minimum_hiragana_share": 3}},
            "share: 3, expected a number from 0 to 1",
        ),
        ("evaluation", "tasks", {"jnli": {"path": math.inf}}, "tasks: jnli: path: inf, expected a finite"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(file, key, value, words):
    with pytest.raises(Refused) as caught:
        check_recipe(changed(tiny(), (file, key), value), "configs/x")
    assert f"configs/x/{file}.json: " in str(caught.value) and words in str(caught.value), str(caught.value)


def test_the_ranges_are_those_of_the_libraries():
    """SentencePiece accepts both ends of character_coverage; transformers has every activation function."""
    assert set(model.ACTIVATIONS) <= set(ACT2FN)
    for coverage in (0.98, 1.0):
        assert train_tokenizer(sentences(500, 1), {"vocab_size": 400, "character_coverage": coverage})


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["q_prj"], "\"q_prj\" is no matrix of mistral. Did you mean 'q_proj'? Known: "),
        (["q_proj", "c_attn"], '"c_attn" is no matrix of mistral. Known: '),
        (["roj"], '"roj" is no matrix'),
        ([], "null is no matrix"),
        ("q_proj", "matches no path of a matrix, such as model.layers.0.self_attn.k_proj"),
        (r".*layers\.99\..*", "matches no path of a matrix"),
        ("(q", "not a regular expression"),
    ],
)
def test_an_adapter_over_no_matrix_is_refused(targets, words):
    with pytest.raises(Refused) as caught:
        check_recipe(
            changed(load_recipe("mistral-300m-qlora"), ("finetune", "lora", "target_modules"), targets), "c/x"
        )
    assert "c/x/finetune.json: lora.target_modules: " in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize(
    ("targets", "taken"),
    [
        (["q_proj", "lm_head"], '"lm_head" takes lm_head'),
        (["embed_tokens"], '"embed_tokens" takes model.embed_tokens'),
        (".*", '".*" takes lm_head and model.embed_tokens'),
        (".*_proj", ""),
    ],
)
def test_an_adapter_over_a_matrix_that_is_shared_is_refused(targets, taken):
    config = changed(load_recipe("mistral-300m-qlora"), ("finetune", "lora", "target_modules"), targets)
    for shared in (False, True):
        config = changed(config, ("model", "tie_word_embeddings"), shared)
        if not (shared and taken):
            assert accepted(config)
            continue
        with pytest.raises(Refused) as caught:
            check_recipe(config, "c/x")
        assert f"c/x/finetune.json: lora.target_modules: {taken}, but the output shares" in str(caught.value)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "0.mlp.up_proj"], r".*layers\.3\..*_proj"])
def test_an_adapter_over_matrices_of_the_model_is_accepted(targets):
    assert accepted(
        changed(load_recipe("mistral-300m-qlora"), ("finetune", "lora", "target_modules"), targets)
    )
