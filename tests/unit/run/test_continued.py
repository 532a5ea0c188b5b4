"""A published checkpoint goes on learning: what is taken over, what new pieces start from, what is
refused.
"""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SHAPE, sentences
from recipe.config import initial_model, model
from recipe.config.recipe import check_recipe, load_recipe
from recipe.model import build
from recipe.project import RecipeError, Refused
from recipe.run import freshness, launch, launch_options, probe
from recipe.run.stage import Stage
from recipe.tokenization import published
from recipe.tokenization.encode_text import encode_texts
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PhiConfig

TEXT = sentences(600, 5)
SMALL = {
    "llama": {key: value for key, value in SHAPE.items() if key != "head_dim"},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
    "gpt_neox": {key: SHAPE[key] for key in SHAPE if key not in ("head_dim", "num_key_value_heads")},
}


def write_tokenizer(folder):
    """A byte-level BPE of a little Japanese, 300 pieces, with an end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=299, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT[:50], trainer)
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))


def write_checkpoint(folder, model_type="llama", rows=300, **values):
    """A published folder: tokenizer, config.json and safetensors of random weights."""
    folder.mkdir()
    write_tokenizer(folder)
    made = AutoConfig.for_model(model_type, **SMALL[model_type] | values | {"vocab_size": rows})
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    return folder


def extended(folder, new_pieces):
    """The folder's tokenizer with new pieces, and their record."""
    values = {"kind": "published", "published": str(folder), "new_pieces": new_pieces}
    tokenizer, old_ids = published.take_over(published.load_published(folder), values, TEXT)
    return tokenizer, initial_model.NewPieces(len(tokenizer) - len(old_ids), old_ids)


def load(folder, tokenizer, pieces, **values):
    return build.continued_model(folder, values, tokenizer, pieces)


# ------------------------------------------------------------------------------------------- the new pieces


def test_new_pieces_of_bpe_stand_for_what_the_old_tokenizer_made(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint")
    old, _ = extended(folder, 0)
    new, pieces = extended(folder, 100)
    assert pieces.first == 300 and len(pieces.old_ids) == 100
    assert all(len(ids) > 1 and max(ids) < 300 for ids in pieces.old_ids)
    for before, after in zip(encode_texts(old, TEXT), encode_texts(new, TEXT), strict=True):
        assert len(after) < len(before) and pieces.spelled(after) == before


def test_new_pieces_of_unigram_stand_for_what_the_old_tokenizer_made(tmp_path):
    alphabet = [("<unk>", 0.0), ("</s>", -9.0), ("▁", -4.0)]
    alphabet += [(letter, -5.0) for letter in sorted(set("".join(TEXT)))]
    tokenizer = Tokenizer(models.Unigram(alphabet, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    new, pieces = extended(tmp_path, 50)
    names = new.convert_ids_to_tokens(list(range(len(new))))
    assert len(pieces.old_ids) == 50
    for name, ids in zip(names[pieces.first :], pieces.old_ids, strict=True):
        assert [names[i] for i in ids] == list(name)  # no ▁ before it


def test_record_must_belong_to_the_tokenizer(tmp_path):
    assert initial_model.read_new_pieces(tmp_path, 300) == initial_model.NewPieces(300, [])
    (tmp_path / initial_model.NEW_PIECES).write_text('{"first": 300, "old_ids": [[1, 2]]}')
    assert initial_model.read_new_pieces(tmp_path, 301).spelled([5, 300]) == [5, 1, 2]
    with pytest.raises(RecipeError, match="300 old and 1 new pieces, but the tokenizer has 305"):
        initial_model.read_new_pieces(tmp_path, 305)


# ------------------------------------------------------------------------------------------------- new rows


@pytest.mark.parametrize(
    ("model_type", "tied"), [("llama", True), ("llama", False), ("gpt2", True), ("gpt_neox", False)]
)
def test_new_rows_are_means_and_nothing_else_changes(tmp_path, model_type, tied):
    folder = write_checkpoint(tmp_path / "checkpoint", model_type, tie_word_embeddings=tied)
    tokenizer, pieces = extended(folder, 20)
    model = load(folder, tokenizer, pieces)
    published_model = build.load_model(folder, "sdpa")  # as `load`: another sums otherwise
    now, then = dict(model.named_parameters()), dict(published_model.named_parameters())
    inputs, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (inputs is output) == tied and model.config.vocab_size == len(inputs) == len(output) == 320
    assert now.keys() == then.keys()
    for name, weight in now.items():
        assert torch.equal(weight[: len(then[name])], then[name]), name
    for rows in (inputs, output):
        for i, ids in enumerate(pieces.old_ids):
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
    tokenizer, pieces = extended(folder, new)
    model = load(folder, tokenizer, pieces)
    assert model.config.vocab_size == rows and pieces.first == 300
    weight, then = model.get_input_embeddings().weight, build.load_model(folder).get_input_embeddings()
    for i, ids in enumerate(pieces.old_ids):
        assert torch.equal(weight[300 + i], weight[ids].mean(0))
    assert torch.equal(weight[300 + new : 384], then.weight[300 + new : 384])


def test_settings_of_generation_are_left_behind(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint")
    (folder / "generation_config.json").write_text('{"temperature": 0.1, "eos_token_id": [7, 8]}')
    model = load(folder, *extended(folder, 0))
    assert model.generation_config.eos_token_id == 299 and model.generation_config.temperature != 0.1
    model.save_pretrained(tmp_path / "saved")


# ---------------------------------------------------------------------------- refused before torch is there


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
        ({"model_type": "bert"}, 'config.json: model_type: "bert", expected one of gpt2'),
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
    with pytest.raises(Refused, match=r"wanted weights as model\.safetensors, found none"):
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
    with pytest.raises(Refused, match="'nobody/nothing': no such folder, and not to be had from the hub"):
        initial_model.find_initial({"initial_model": "nobody/nothing"})
    assert (
        initial_model.published_config({"initial_model": "nobody/nothing"}) == {}
    )  # known once it was fetched
    with pytest.raises(Refused, match="no such folder, and no name of the hub"):
        initial_model.published_config({"initial_model": str(tmp_path / "gone/away")})


def test_a_fetched_checkpoint_is_checked_again_before_it_is_loaded(monkeypatch, tmp_path):
    """Of a name of the hub nothing is known until stage 05 has fetched it."""
    folder = write_checkpoint(tmp_path / "checkpoint")
    values = recipe_of("nobody/model", pretrain_block_size=512)
    check_recipe(values, "configs/x")
    monkeypatch.setattr(initial_model, "_fetch", lambda name, revision: folder)
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda name, file, revision: str(folder / file)
    )
    stage = Stage("05_pretrain", "x", values, {}, tmp_path, default_options(), -1)
    with pytest.raises(Refused, match="block_size: 512, more than the 256 positions of nobody/model/config"):
        launch._run_child(stage, Path("run_clm.py"), tmp_path)


def test_a_dry_run_before_the_checkpoint_is_fetched_says_what_is_not_known(capsys):
    launch._forecast(recipe_of("nobody/model"), default_options())
    assert "parameters   known once the checkpoint is fetched: nobody/model" in capsys.readouterr().out


def test_a_probe_fetches_the_checkpoint_and_checks_again(monkeypatch, tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint")
    values = recipe_of("nobody/model", pretrain_block_size=512)
    monkeypatch.setattr(initial_model, "_fetch", lambda name, revision: folder)
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda name, file, revision: str(folder / file)
    )
    monkeypatch.setattr(probe, "load_recipe", lambda recipe, overrides: values)
    monkeypatch.setattr(probe, "stage_folder", lambda recipe, stage: tmp_path / stage)
    monkeypatch.setattr("sys.argv", ["05_pretrain.sh", "--recipe", "x", "--probe"])
    for stage in ("03_tokenizer", "04_tokenize"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "stage.json").write_text("{}")
    with pytest.raises(Refused, match="block_size: 512, more than the 256 positions of nobody/model/config"):
        probe.main(Path("run_clm.py"))


def default_options():
    parser = argparse.ArgumentParser()
    launch_options.add_options(parser)
    return parser.parse_args([])


def test_more_ids_than_rows_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", rows=290)
    with pytest.raises(Refused, match=r"config\.json: vocab_size: 290, but the tokenizer has 300 pieces"):
        initial_model.check_rows({"initial_model": str(folder)}, extended(folder, 20)[1])
    with pytest.raises(RecipeError, match="300 published pieces, the checkpoint 290 rows"):
        load(folder, *extended(folder, 20))


# ---------------------------------------------------------------------------- refused before it is trained


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


def test_changed_weights_are_a_changed_fact(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint")
    values = recipe_of(folder)
    before = freshness.pretraining_facts(values)
    assert before == freshness.pretraining_facts(values)
    shutil.copy(folder / "model.safetensors", tmp_path / "copy")
    shutil.move(tmp_path / "copy", folder / "model.safetensors")
    assert freshness.pretraining_facts(values) != before
    assert freshness.pretraining_facts(load_recipe("tiny")) == {"weights": {}}


# --------------------------------------------------------------------------------------- the stages together


@pytest.fixture(scope="module")
def continued(make_project):
    """A project in which the recipe `mini` goes on from a published checkpoint, with 36 new pieces."""
    project = make_project()
    write_checkpoint(project.folder / "published", "gpt2", rows=320)
    (project.folder / "configs/mini/model.json").unlink()
    tokenizer = {"kind": "published", "published": "published", "new_pieces": 30, "round_to": 16}
    (project.folder / "configs/mini/tokenizer.json").write_text(json.dumps(tokenizer))
    changes = {"initial_model": "published", "muon_learning_rate": None, "learning_rate": 1e-30}
    project.edit("mini", "pretrain", **changes, max_steps=1, eval_steps=1, save_steps=1)
    project.edit("mini", "generation", do_sample=False)
    project.run("run_all.sh", "--recipe", "mini", "--to", "07")
    return project


def test_stages_start_from_the_checkpoint(continued):
    trained = continued.figures("mini", "05_pretrain")
    wanted = {"name": "published", "revision": None, "commit": None}
    assert trained["initial_model"] == wanted | {"new_pieces": 36, "rows_added": 16, "rows": 336}
    folder = continued.output("mini", "05_pretrain", "")
    model, then = build.load_model(folder), build.load_model(continued.folder / "published")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = initial_model.read_new_pieces(continued.output("mini", "03_tokenizer", ""), len(tokenizer))
    rows, old = model.transformer.wte.weight, then.transformer.wte.weight
    assert torch.equal(rows[:300], old[:300])  # at such a rate nothing is learnt
    wanted = torch.stack([old[ids].mean(0) for ids in pieces.old_ids])
    assert torch.equal(rows[300:336], wanted)


def test_samples_before_are_those_of_the_published_model(continued):
    samples = json.loads(continued.output("mini", "07_generate", "samples.json").read_text())
    folder = continued.folder / "published"
    tokenizer, _ = extended(folder, 0)
    ids = torch.tensor([encode_texts(tokenizer, ["今日は"])[0]])
    made = build.load_model(folder).generate(
        ids, max_new_tokens=8, do_sample=False, pad_token_id=299, eos_token_id=299
    )
    assert samples[0]["before"].strip("\ufffd") in tokenizer.decode(made[0])
    assert samples[0]["before"] == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_another_checkpoint_makes_the_training_stale(continued):
    line = ("pretrain/05_pretrain.sh", "--recipe", "mini")
    assert "done before" in continued.run(*line).stdout
    weights = continued.folder / "published/model.safetensors"
    saved = load_file(weights)
    save_file({k: v + 1 for k, v in saved.items()}, weights, {"format": "pt"})
    result = continued.run(*line, check=False)
    assert result.returncode == 2 and "stale" in result.stderr and "initial_model" in result.stderr
    torch.save(saved, weights.with_name("pytorch_model.bin"))
    weights.unlink()
    result = continued.run(*line, "--force", check=False)
    assert result.returncode == 2 and "Pickled weights" in result.stderr


# ------------------------------------------------------------------------------------- several ranks (slow)

WAYS = {
    "alone": ((), "one process"),
    "ddp": (("--nproc", "2"), "DDP 2"),
    "zero3": (("--nproc", "2", "--deepspeed", "zero3"), "ZeRO-3"),
    "fsdp": (("--nproc", "2", "--fsdp"), "FSDP2 2"),
}


@pytest.mark.slow
def test_ranks_together_start_from_the_same_weights(make_project):
    """The same losses as of one process, the first of them at the published weights and the mean rows."""
    project = make_project()
    write_checkpoint(project.folder / "published", rows=310)
    (project.folder / "configs/mini/model.json").unlink()
    tokenizer = {"kind": "published", "published": "published", "new_pieces": 30, "round_to": 16}
    (project.folder / "configs/mini/tokenizer.json").write_text(json.dumps(tokenizer))
    changes = {"initial_model": "published", "muon_learning_rate": None, "max_steps": 6}
    project.edit("mini", "pretrain", **changes)
    losses = {}
    for way, (options, parallel) in WAYS.items():
        shutil.copytree(project.folder / "configs/mini", project.folder / "configs" / way)
        project.run("run_all.sh", "--recipe", way, "--to", "04")
        project.run("pretrain/05_pretrain.sh", "--recipe", way, "--force", *options, timeout=900)
        rows = project.output(way, "05_pretrain", "metrics.jsonl").read_text().splitlines()
        losses[way] = [row["loss"] for row in map(json.loads, rows) if "loss" in row]
        figures = project.figures(way, "05_pretrain")
        assert figures["active"]["parallel"] == parallel
        assert figures["initial_model"]["rows_added"] == 26
    assert len(losses["alone"]) == 6
    for way in WAYS:
        assert losses[way] == pytest.approx(losses["alone"], rel=1e-5), way
