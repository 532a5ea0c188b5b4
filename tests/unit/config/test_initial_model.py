"""The published checkpoint that a training starts from: checked before torch is imported."""

import json

import pytest
import torch
from published_checkpoint import extended, load, recipe_of, refusal, write_checkpoint
from recipe.config import initial_model, model
from recipe.config.recipe import check_recipe, load_recipe
from recipe.project import RecipeError, Refused
from safetensors.torch import load_file


def test_record_must_belong_to_the_tokenizer(tmp_path):
    assert initial_model.read_new_pieces(tmp_path, 300) == initial_model.NewPieces(300, [])
    (tmp_path / initial_model.NEW_PIECES).write_text('{"first": 300, "old_ids": [[1, 2]]}')
    assert initial_model.read_new_pieces(tmp_path, 301).spelled([5, 300]) == [5, 1, 2]
    with pytest.raises(RecipeError, match="300 old and 1 new tokens, but the tokenizer has 305"):
        initial_model.read_new_pieces(tmp_path, 305)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer": {"vocab_size": 8000}}, "trains a new vocabulary"),
        ({"tokenizer_published": "OTHER/model"}, "takes its vocabulary from OTHER/model"),
        (
            {"tokenizer_revision": "v1"},
            'initial_revision: null, but configs/x/tokenizer.json has revision "v1"',
        ),
        ({"model": {"model_type": "gpt2"}}, 'configs/x/model.json: model_type: "gpt2", but'),
        (
            {"model": {"model_type": "llama", "hidden_size": 64}},
            "configs/x/model.json: hidden_size: 64, but {folder}/config.json has 32",
        ),
        (
            {"pretrain_block_size": 512},
            "configs/x/pretrain.json: block_size: 512, more than the 256 positions of {folder}/config.json",
        ),
        ({"generation_max_new_tokens": 256}, "in the 256 positions of {folder}/config.json"),
        ({"pretrain_initial_modell": "x"}, "Did you mean 'initial_model'?"),
        ({"finetune_initial_model": "x"}, "configs/x/finetune.json: initial_model: unknown key"),
    ],
)
def test_what_does_not_fit_is_refused_by_file_and_key(tmp_path, changes, words):
    folder = write_checkpoint(tmp_path / "checkpoint")
    assert words.format(folder=folder) in refusal(recipe_of(folder, **changes))


def test_what_fits_is_accepted(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint")
    check_recipe(recipe_of(folder), "configs/x")
    check_recipe(recipe_of(folder, tokenizer_new_pieces=64, tokenizer_round_to=64), "configs/x")
    check_recipe(
        recipe_of(folder, model={"model_type": "llama", "hidden_size": 32, "eos_token_id": 299}), "configs/x"
    )
    assert model.model_values(recipe_of(folder))["num_key_value_heads"] == 2


LONGER = {"model_type": "llama", "max_position_embeddings": 512}
LONGER |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}


def test_the_context_of_a_checkpoint_may_be_changed(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint")
    recipe = recipe_of(folder, model=LONGER, pretrain_block_size=512)
    check_recipe(recipe, "configs/x")
    values = model.model_values(recipe)
    assert values["max_position_embeddings"] == 512 and values["rope_parameters"]["rope_theta"] == 1e6
    tokenizer, new_tokens = extended(folder, 0)
    changed, then = load(folder, tokenizer, new_tokens, **LONGER), load(folder, tokenizer, new_tokens)
    assert changed.config.max_position_embeddings == 512 and then.config.max_position_embeddings == 256
    frequencies = changed.model.rotary_emb.inv_freq
    assert torch.allclose(frequencies, 1e6 ** -(torch.arange(0, 16, 2) / 16))
    assert not torch.equal(frequencies, then.model.rotary_emb.inv_freq)
    assert all(torch.equal(*pair) for pair in zip(changed.parameters(), then.parameters(), strict=True))
    made = initial_model.describe_initial(recipe, folder, new_tokens, 300, 300)["context"]
    assert made["max_position_embeddings"] == [256, 512]
    assert [rope["rope_theta"] for rope in made["rope_parameters"]] == [10000.0, 1e6]


def test_a_config_json_of_transformers_4_has_its_rotary_embeddings_elsewhere():
    scaling = {"type": "linear", "factor": 2.0}
    old = {"max_position_embeddings": 256, "rope_theta": 500.0, "rope_scaling": scaling}
    same = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}
    assert initial_model.changed_context(same, old) == {}
    assert list(initial_model.changed_context(LONGER, old)) == ["max_position_embeddings", "rope_parameters"]
    assert initial_model.changed_context(LONGER, {}) == {}
    gemma = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": scaling}
    layers = {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}}
    layers |= {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    assert initial_model.changed_context({"rope_parameters": layers}, gemma) == {}


def test_learnt_positions_cannot_be_changed(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", "gpt2")
    words = f"configs/x/model.json: n_positions: 512, but {folder}/config.json has 256"
    assert words in refusal(recipe_of(folder, model={"model_type": "gpt2", "n_positions": 512}))


def test_revision_alone_and_no_model_at_all_are_refused(tmp_path):
    values = load_recipe("tiny")
    values["pretrain"]["initial_revision"] = "main"
    assert "but there is no initial_model" in refusal(values)
    values = load_recipe("tiny")
    values["model"] = {}
    assert "model.json: model_type: missing" in refusal(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "bert"}, 'config.json: model_type: "bert", expected one of gemma3_text, gpt2'),
        ({"quantization_config": {"bits": 4}}, "quantised weights cannot be trained further"),
    ],
)
def test_checkpoints_of_other_kinds_are_refused(tmp_path, change, words):
    folder = write_checkpoint(tmp_path / "checkpoint")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert words in refusal(recipe_of(folder))


def test_folders_without_safetensors_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint")
    weights = folder / "model.safetensors"
    assert initial_model.find_initial({"initial_model": str(folder)}) == folder
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(Refused, match=r"found only pytorch_model\.bin\. Pickled weights .* can run code"):
        initial_model.find_initial({"initial_model": str(folder)})
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(Refused, match=r"expected weights in model\.safetensors, found none"):
        initial_model.find_initial({"initial_model": str(folder)})
    assert "found none" in refusal(recipe_of(folder))  # already before stage 01
    weights.touch()
    (folder / "config.json").write_text("{")
    assert "config.json: not valid JSON" in refusal(recipe_of(folder))
    (folder / "config.json").unlink()
    assert "config.json: No such file" in refusal(recipe_of(folder))


def test_a_name_that_is_neither_folder_nor_on_the_hub_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Refused, match="'nobody/nothing': no such folder, and not available from the hub"):
        initial_model.find_initial({"initial_model": "nobody/nothing"})
    assert (
        initial_model.published_config({"initial_model": "nobody/nothing"}) == {}
    )  # known once it was fetched
    for name in (str(tmp_path / "gone/away"), "~nosuch/model"):
        with pytest.raises(Refused, match="no such folder, and not a name on the hub"):
            initial_model.published_config({"initial_model": name})


def test_more_ids_than_rows_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", rows=290)
    with pytest.raises(Refused, match=r"config\.json: vocab_size: 290, but the tokenizer has 300 tokens"):
        initial_model.check_rows({"initial_model": str(folder)}, extended(folder, 20)[1])
    with pytest.raises(RecipeError, match="300 published tokens, the checkpoint 290 rows"):
        load(folder, *extended(folder, 20))
