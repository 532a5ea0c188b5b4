"""Tuning end to end: an adapter and its merge, preferences, and what is talked to afterwards."""

import json
import shutil

import pytest
import torch
from conftest import sentences

LORA = {"r": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def tuned(project):
    """The recipe `lora`: mini with an adapter in stage 12 and preferences in stage 13."""
    shutil.copytree(project.folder / "configs/mini", project.folder / "configs/lora")
    project.edit("lora", "finetune", lora=LORA)
    rows = [
        {"prompt": f"{i}番は何ですか?", "chosen": text, "rejected": f"{i}番はわかりません。"}
        for i, text in enumerate(sentences(40, 5))
    ]
    rows.append({"prompt": "同じ?", "chosen": "はい。", "rejected": "はい。"})
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (project.folder / "preferences.jsonl").write_text(text, "utf-8")
    preference = {
        "pairs": {"mine": {"path": "preferences.jsonl"}},
        "valid_share": 0.2,
        "block_size": 128,
        "global_batch_size": 4,
        "per_device_train_batch_size": 2,
        "max_steps": 8,
        "learning_rate": 3e-3,
        "beta": 0.1,
        "logging_steps": 1,
        "save_steps": 4,
        "bf16": False,
    }
    (project.folder / "configs/lora/preference.json").write_text(json.dumps(preference))
    result = project.run("run_all.sh", "--recipe", "lora", timeout=600)
    return project, result


def load(project, stage):
    from recipe.modeling import load_model

    return load_model(project.output("lora", stage, "."))


def test_the_merged_model_is_the_base_and_its_adapter(tuned):
    from peft import PeftModel
    from recipe.modeling import load_model

    project, _ = tuned
    base = load_model(project.output("lora", "05_pretrain", "."))
    ids = torch.arange(5, 45).reshape(1, -1)
    with torch.inference_mode():
        alone = base(ids).logits
        merged = load(project, "12_finetune")(ids).logits
        folder = project.output("lora", "12_finetune", "adapter")
        apart = PeftModel.from_pretrained(base, str(folder))(ids).logits
    torch.testing.assert_close(merged, apart, rtol=0, atol=1e-4)
    assert (merged - alone).abs().max() > 1e-2


def test_only_the_adapter_was_trained(tuned):
    project, _ = tuned
    figures = project.figures("lora", "12_finetune")
    folder = project.output("lora", "12_finetune", "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == LORA["r"]
    assert 0 < figures["trained_parameters"] < figures["active"]["parameters"] / 3
    assert not list(project.output("lora", "12_finetune", ".").rglob("training_args.bin"))[1:]


def test_preferences_move_the_model_towards_the_chosen(tuned):
    project, result = tuned
    figures = project.figures("lora", "13_preference")
    assert figures["pairs"]["mine"]["dropped"] == {"chosen equals rejected": 1}
    assert figures["steps"] == 8 and figures["eval_loss"] < 0.6
    rows = project.output("lora", "13_preference", "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, rows) if "loss" in row]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # -log sigmoid(0): the model is its own reference
    assert losses[-1] < 0.6


def test_the_last_model_is_evaluated_and_talked_to(tuned):
    project, _ = tuned
    for stage in ("14_evaluate", "15_generate"):
        record = json.loads(project.output("lora", stage).read_text())
        assert "13_preference" in record["wanted"]["inputs"]


def test_without_a_preference_file_stage_13_is_skipped(project):
    result = project.run("fine-tuning/13_preference.sh", "--recipe", "mini")
    assert "skipped: there is no preference.json" in result.stdout


def test_preview_marks_the_answer(tuned):
    _, result = tuned
    assert result.stdout.count("Assistant:\n【") == 3


def test_nf4_is_refused_without_a_gpu(project):
    change = ("--set", 'finetune.lora={"quantization": "nf4"}')
    result = project.run("run_all.sh", "--recipe", "mini", *change, check=False)
    assert result.returncode == 2
    assert "no NVIDIA GPU" in result.stderr and "finetune.lora.quantization=null" in result.stderr


def test_a_stopped_tuning_of_an_adapter_continues_to_the_same_weights(tuned):
    from safetensors.torch import load_file

    project, _ = tuned
    shutil.copytree(project.folder / "configs/lora", project.folder / "configs/again")
    (project.folder / "configs/again/preference.json").unlink()
    project.edit("again", "finetune", save_steps=2)
    project.run("run_all.sh", "--recipe", "again", "--to", "12")
    done = project.output("again", "12_finetune", ".").resolve()
    first = load_file(done / "model.safetensors")
    # What a kill after step 2 leaves: the work folder with the checkpoint of that step.
    work = done.with_name(".12_finetune.work")
    done.rename(work)
    wanted = json.loads((work / "stage.json").read_text())["wanted"]
    (work / ".wanted.json").write_text(json.dumps(wanted))
    for name in ("stage.json", "result.json", "model.safetensors"):
        (work / name).unlink()
    shutil.rmtree(work / "adapter")
    for checkpoint in work.glob("checkpoints/checkpoint-*"):
        if checkpoint.name != "checkpoint-2":
            shutil.rmtree(checkpoint)
    result = project.run("fine-tuning/12_finetune.sh", "--recipe", "again")
    assert "continues from checkpoint-2" in result.stdout
    second = load_file(done / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_noisy_embeddings_are_off_unless_asked_for(project):
    """NEFTune: the same first batch has another loss, and evaluation is without noise."""
    shutil.copytree(project.folder / "configs/mini", project.folder / "configs/noisy")
    project.edit("noisy", "finetune", neftune_noise_alpha=50.0, learning_rate=0.0)
    project.run("run_all.sh", "--recipe", "noisy", "--to", "12")
    project.edit("noisy", "finetune", neftune_noise_alpha=None)
    noisy = rows_of(project, "noisy")
    project.run("fine-tuning/12_finetune.sh", "--recipe", "noisy", "--force")
    plain = rows_of(project, "noisy")
    assert noisy[0]["loss"] != pytest.approx(plain[0]["loss"], rel=1e-3)
    assert noisy[-1]["eval_loss"] == pytest.approx(plain[-1]["eval_loss"], rel=1e-6)


def rows_of(project, recipe):
    """The logged rows of stage 12."""
    return [
        json.loads(line)
        for line in project.output(recipe, "12_finetune", "metrics.jsonl").read_text().splitlines()
    ]
