"""The stages from a published checkpoint on, together."""

import json

import pytest
import torch
from published_checkpoint import extended, write_checkpoint
from recipe.config import initial_model
from recipe.model import build
from recipe.tokenization.encode_text import encode_texts
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def continued(make_project):
    """A project in which the recipe `mini` continues from a published checkpoint, with 36 new tokens."""
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
    expected = {"name": "published", "revision": None, "commit": None}
    assert trained["initial_model"] == expected | {"new_pieces": 36, "rows_added": 16, "rows": 336}
    folder = continued.output("mini", "05_pretrain", "")
    model, then = build.load_model(folder), build.load_model(continued.folder / "published")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    new_tokens = initial_model.read_new_pieces(continued.output("mini", "03_tokenizer", ""), len(tokenizer))
    rows, old = model.transformer.wte.weight, then.transformer.wte.weight
    assert torch.equal(rows[:300], old[:300])  # at such a rate nothing is learnt
    expected = torch.stack([old[ids].mean(0) for ids in new_tokens.old_ids])
    assert torch.equal(rows[300:336], expected)


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


@pytest.mark.slow
def test_a_longer_context_is_said_in_the_card_and_evaluated_at_both_lengths(make_project):
    project = make_project()
    write_checkpoint(project.folder / "published")
    model = {"model_type": "llama", "max_position_embeddings": 512}
    model |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    for name, values in {
        "model": model,
        "tokenizer": {"kind": "published", "published": "published"},
        "instruction": {"pairs": {}},
    }.items():
        (project.folder / f"configs/mini/{name}.json").write_text(json.dumps(values))
    changes = {"initial_model": "published", "max_steps": 2, "eval_steps": 2, "block_size": 512}
    project.edit("mini", "pretrain", **changes)
    project.run("run_all.sh", "--recipe", "mini")
    config = json.loads(project.output("mini", "05_pretrain", "config.json").read_text())
    assert config["max_position_embeddings"] == 512 and config["rope_parameters"]["rope_theta"] == 1e6
    lengths = project.figures("mini", "06_evaluate")["lengths"]
    assert list(lengths) == ["512", "256"]
    assert lengths["512"]["in_domain"]["loss"] != lengths["256"]["in_domain"]["loss"]
    assert "in domain, blocks of 256" in project.output("mini", "06_evaluate", "metrics.md").read_text()
    card = project.output("mini", "16_export", "README.md").read_text()
    assert "Its context was changed: max_position_embeddings from 256 to 512" in card


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
        project.copy(way)
        project.run("run_all.sh", "--recipe", way, "--to", "04")
        project.run("pretrain/05_pretrain.sh", "--recipe", way, "--force", *options, timeout=900)
        losses[way] = project.losses(way)
        figures = project.figures(way, "05_pretrain")
        assert figures["active"]["parallel"] == parallel
        assert figures["initial_model"]["rows_added"] == 26
    assert len(losses["alone"]) == 6
    for way in WAYS:
        assert losses[way] == pytest.approx(losses["alone"], rel=1e-5), way
