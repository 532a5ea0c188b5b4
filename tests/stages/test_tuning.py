"""Tuning end to end: an adapter and its merge, preferences, and the model that the chat uses afterwards."""

import contextlib
import json
import os
import shutil
import signal
import time

import pytest
import torch
from conftest import sentences
from recipe.run.processes import descendants

LORA = {"r": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def tuned(project):
    """The recipe `lora`: mini with an adapter in stage 12 and preferences in stage 13."""
    project.copy("lora")
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
    from recipe.model.build import load_model

    return load_model(project.output("lora", stage, "."))


def test_the_merged_model_is_the_base_and_its_adapter(tuned):
    from peft import PeftModel
    from recipe.model.build import load_model

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
    active = figures["active"]  # read from the running trainer, as in stage 05
    assert active["optimizer"] == "AdamW" and active["accumulation"] == 2 and active["precision"] == "fp32"
    assert "active: device cpu, precision fp32" in result.stdout.partition("13_preference")[2]
    assert "extra forward pass" not in result.stdout + result.stderr  # a warning of trl
    losses = project.losses("lora", "13_preference")
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


@pytest.mark.parametrize("file", ["finetune", "preference"])
def test_nf4_is_refused_without_a_gpu(tuned, file):
    project, _ = tuned
    change = ("--set", f'{file}.lora={{"r": 4, "quantization": "nf4"}}')
    result = project.run("run_all.sh", "--recipe", "lora", *change, check=False)
    assert result.returncode == 2 and "01_download" not in result.stdout
    assert "no NVIDIA GPU" in result.stderr and f"{file}.lora.quantization=null" in result.stderr


@pytest.mark.parametrize(
    ("stage", "file", "script"),
    [
        ("12_finetune", "finetune", "fine-tuning/12_finetune.sh"),
        ("13_preference", "preference", "fine-tuning/13_preference.sh"),
    ],
)
def test_a_killed_tuning_continues_to_the_same_weights(tuned, stage, file, script):
    """SIGKILL to every process after a checkpoint: losses and weights are those of an undisturbed run."""
    project, _ = tuned
    name = f"killed-{file}"
    shutil.copytree(project.folder / "configs/lora", project.folder / "configs" / name)
    project.edit(name, file, max_steps=40, save_steps=2, eval_strategy="no")
    project.run("run_all.sh", "--recipe", name, "--to", str(int(stage[:2]) - 1))
    work = project.output(name, f".{stage}.work", "")
    process = project.start(script, "--recipe", name)
    deadline = time.monotonic() + 240
    while not list(work.glob("checkpoints/checkpoint-*/manifest.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for child in reversed(descendants(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    process.communicate()
    assert not project.output(name, stage).exists()
    result = project.run(script, "--recipe", name)
    assert "continues from checkpoint-" in result.stdout
    continued = losses_and_weights(project, name, stage)
    assert len(continued[0]) == 40
    project.run(script, "--recipe", name, "--force")
    assert losses_and_weights(project, name, stage) == continued


def losses_and_weights(project, recipe, stage):
    """The logged losses by step, and the digests of the model, and of the adapter if there is one."""
    losses = [(row["step"], row["loss"]) for row in project.log(recipe, stage) if "loss" in row]
    folder = project.output(recipe, stage, ".")
    files = [*folder.glob("*.safetensors"), *folder.glob("adapter/*.safetensors")]
    assert len(files) == (2 if (folder / "adapter").exists() else 1)
    return losses, [project.digest(recipe, stage, str(file.relative_to(folder))) for file in files]


def test_noisy_embeddings_are_off_unless_asked_for(project):
    """NEFTune: the first batch has another loss, and the evaluation has no noise."""
    project.copy("noisy")
    project.edit("noisy", "finetune", learning_rate=0.0)
    project.run("run_all.sh", "--recipe", "noisy", "--to", "12")
    plain = project.log("noisy", "12_finetune")
    stage = ("fine-tuning/12_finetune.sh", "--recipe", "noisy", "--force")
    project.run(*stage, "--set", "finetune.neftune_noise_alpha=0")
    assert [row["loss"] for row in project.log("noisy", "12_finetune")[:6]] == [
        row["loss"] for row in plain[:6]
    ]
    project.run(*stage, "--set", "finetune.neftune_noise_alpha=50.0")
    noisy = project.log("noisy", "12_finetune")
    assert noisy[0]["loss"] != pytest.approx(plain[0]["loss"], rel=1e-3)
    assert noisy[-1]["eval_loss"] == pytest.approx(plain[-1]["eval_loss"], rel=1e-6)
