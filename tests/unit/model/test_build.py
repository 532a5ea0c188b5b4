"""A model from a published checkpoint: rows of new tokens, and weights that do not fit."""

import json

import pytest
import torch
from conftest import SHAPE
from published_checkpoint import extended, load, write_checkpoint
from recipe.config import initial_model
from recipe.model import build
from recipe.project import RecipeError, Refused
from recipe.tokenization.encode_text import encode_texts
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PhiConfig


@pytest.mark.parametrize(
    ("model_type", "tied"),
    [
        ("llama", True),
        ("llama", False),
        ("gpt2", True),
        ("gpt_neox", False),
        ("qwen2", True),
        ("olmo2", False),
        ("gemma3_text", True),
        ("qwen3_moe", False),
    ],
)
def test_new_rows_are_means_and_nothing_else_changes(tmp_path, model_type, tied):
    folder = write_checkpoint(tmp_path / "checkpoint", model_type, tie_word_embeddings=tied)
    tokenizer, new_tokens = extended(folder, 20)
    model = load(folder, tokenizer, new_tokens)
    published_model = build.load_model(folder, "sdpa")  # as `load`: another sums otherwise
    now, then = dict(model.named_parameters()), dict(published_model.named_parameters())
    inputs, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (inputs is output) == tied and model.config.vocab_size == len(inputs) == len(output) == 320
    assert now.keys() == then.keys()
    for name, weight in now.items():
        assert torch.equal(weight[: len(then[name])], then[name]), name
    for rows in (inputs, output):
        for i, ids in enumerate(new_tokens.old_ids):
            assert torch.equal(rows[300 + i], rows[ids].mean(0))
    ids = torch.tensor([encode_texts(tokenizer, ["the cat"])[0]])
    assert torch.equal(model(ids).logits[..., :300], published_model(ids).logits)
    assert (model.config.eos_token_id, model.config.bos_token_id) == (tokenizer.eos_token_id, None)


def test_new_outputs_have_a_mean_bias_where_the_architecture_has_one():
    shape = {key: value for key, value in SHAPE.items() if key != "head_dim"}
    model = AutoModelForCausalLM.from_config(PhiConfig(vocab_size=30, **shape, tie_word_embeddings=False))
    torch.nn.init.normal_(model.lm_head.bias)
    build.add_rows(model, initial_model.NewPieces(30, [[1, 2, 5], [7, 8]]))
    assert torch.equal(model.lm_head.bias[30], model.lm_head.bias[[1, 2, 5]].mean())
    assert len(model.lm_head.bias) == 32


@pytest.mark.parametrize(("new", "rows"), [(0, 384), (20, 384), (100, 400)])
def test_rows_beyond_the_vocabulary_are_taken_first(tmp_path, new, rows):
    folder = write_checkpoint(tmp_path / "checkpoint", rows=384)  # 300, rounded up to a multiple of 128
    tokenizer, new_tokens = extended(folder, new)
    model = load(folder, tokenizer, new_tokens)
    assert model.config.vocab_size == rows and new_tokens.first == 300
    weight, then = model.get_input_embeddings().weight, build.load_model(folder).get_input_embeddings()
    for i, ids in enumerate(new_tokens.old_ids):
        assert torch.equal(weight[300 + i], weight[ids].mean(0))
    assert torch.equal(weight[300 + new : 384], then.weight[300 + new : 384])


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "qwen3", "olmo2", "gemma3_text"])
def test_nothing_is_dropped_in_training_mode(model_type):
    names = ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout")
    config = AutoConfig.for_model(model_type, **SHAPE | {"vocab_size": 50} | dict.fromkeys(names, 0.5))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    ids = torch.arange(20)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(build.without_dropout(model)(ids).logits, model(ids).logits)
    assert model.config.to_dict() == config.to_dict()


def test_settings_of_generation_are_left_behind(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint")
    (folder / "generation_config.json").write_text('{"temperature": 0.1, "eos_token_id": [7, 8]}')
    model = load(folder, *extended(folder, 0))
    assert model.generation_config.eos_token_id == 299 and model.generation_config.temperature != 0.1
    model.save_pretrained(tmp_path / "saved")


def test_checkpoints_that_are_not_what_they_say_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint")
    weights, fitting = load_file(folder / "model.safetensors"), extended(folder, 0)
    gone = {k: v for k, v in weights.items() if k != "model.layers.1.mlp.up_proj.weight"}
    save_file(gone, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match=r"1 weights .* such as model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder, *fitting)
    wrong = weights | {"model.norm.weight": torch.ones(31)}
    save_file(wrong, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match=r"cannot be loaded into the model of its config\.json"):
        load(folder, *fitting)
    (folder / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(RecipeError, match=r"cannot be loaded"):
        load(folder, *fitting)


def test_model_json_is_compared_with_what_the_checkpoint_leaves_to_defaults(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint")
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "hidden_act"}))
    load(folder, *extended(folder, 0), model_type="llama", hidden_act="silu", vocab_size=300)
    with pytest.raises(Refused, match=r"model\.json: hidden_act: gelu, but .*config\.json makes it silu"):
        load(folder, *extended(folder, 0), model_type="llama", hidden_act="gelu")


@pytest.mark.parametrize("kind", ["missing", "unexpected"])
def test_weights_that_are_not_those_of_the_config_are_refused(tmp_path, kind):
    folder = write_checkpoint(tmp_path / "05_pretrain")
    weights = load_file(folder / "model.safetensors")
    if kind == "missing":
        weights.pop("model.norm.weight")
    else:
        weights["model.more.weight"] = weights["model.norm.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        RecipeError, match=rf"05_pretrain: 1 {kind} weights, such as model\.\w+\.weight.*--force"
    ):
        build.load_model(folder)


def test_one_thread_makes_the_first_call_of_the_vector_functions(tmp_path):
    """See `recipe.hardware.initialise_vector_math`: otherwise a model's first cosines are sometimes wrong."""
    sizes = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function._opname in ("cos", "sin", "exp", "log"):
                sizes.append(arguments[0].numel())
            return function(*arguments, **keywords or {})

    folder = write_checkpoint(tmp_path / "checkpoint")
    with Recorder():
        build.load_model(folder)(torch.arange(200)[None])
    assert sizes[0] == 1 and max(sizes) > 1


def test_a_loaded_model_computes_with_the_threads_of_this_process(tmp_path, monkeypatch):
    folder, before = write_checkpoint(tmp_path / "checkpoint"), torch.get_num_threads()
    monkeypatch.setattr("recipe.host.threads", lambda: before + 1)
    monkeypatch.setenv("OMP_NUM_THREADS", str(before))
    try:
        build.load_model(folder)
        assert torch.get_num_threads() == before  # what the user has set
        monkeypatch.delenv("OMP_NUM_THREADS")
        build.load_model(folder)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
