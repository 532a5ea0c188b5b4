"""Training by rewards (GRPO) end to end: the reward rises, a killed run continues, two ranks share groups."""

import contextlib
import json
import os
import signal
import time

import pytest
from recipe.run.processes import descendants

STAGE, SCRIPT = "13_preference", "fine-tuning/13_preference.sh"
PREFERENCE = {
    "method": "grpo",
    "pairs": {"mine": {"path": "questions.jsonl"}},
    "valid_share": 0.2,
    "rewards": {"length": {"maximum": 30}, "format": {"pattern": ".*。", "weight": 0.5}},
    "num_generations": 4,
    "max_completion_length": 32,
    "block_size": 96,
    "global_batch_size": 16,
    "per_device_train_batch_size": 8,
    "max_steps": 20,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "save_steps": 5,
    "bf16": False,
}


@pytest.fixture(scope="module")
def asked(project):
    """The project with questions; `add` makes a recipe of mini that trains by rewards."""
    rows = [{"instruction": f"{i}番は何ですか?", "output": "はい。"} for i in range(60)]
    rows.append({"instruction": "長い" * 200, "output": "はい。"})
    rows.append({"messages": [{"role": "user", "content": "0番は何ですか?"}]})
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (project.folder / "questions.jsonl").write_text(text, "utf-8")

    def add(name, dropout=0.0, **changes):
        project.copy(name)
        if dropout:
            project.edit(name, "model", attention_dropout=dropout)
        path = project.folder / f"configs/{name}/preference.json"
        path.write_text(json.dumps(PREFERENCE | changes), "utf-8")
        project.run("run_all.sh", "--recipe", name, "--to", "12")

    project.add_rewards = add
    return project


def test_the_reward_rises_and_every_question_is_counted(asked):
    asked.add_rewards("rewards")
    result = asked.run(SCRIPT, "--recipe", "rewards")
    figures = asked.figures("rewards", STAGE)
    assert figures["reward"] > figures["reward_before"] + 0.3
    assert f"valid reward {figures['reward_before']:.3f} -> {figures['reward']:.3f}" in result.stdout
    counts = figures["pairs"]["mine"]
    assert (counts["in"], counts["out"], counts["dropped"]) == (62, 61, {"no answer": 1})
    assert sum(side["question too long"] for side in figures["left_out"].values()) == 1
    rows = asked.log("rewards", STAGE)
    before, after = rows[0], rows[-1]
    assert before["step"] == 0 and after["step"] == 20
    assert [row["eval_reward"] for row in (before, after)] == [figures["reward_before"], figures["reward"]]
    assert after["eval_rewards/length"] > before["eval_rewards/length"]
    assert figures["tokens"] == after["tokens"] < figures["active"]["tokens_per_step"] * 20
    files = {path.name for path in asked.output("rewards", STAGE, ".").iterdir()}
    assert {"model.safetensors", "chat_template.jinja", "funnel.md", "learning_curve.png"} <= files
    sampling = asked.output("rewards", STAGE, "generation_config.json").read_text()
    assert sampling == asked.output("rewards", "12_finetune", "generation_config.json").read_text()


def test_a_killed_training_continues_to_the_same_weights(asked):
    """SIGKILL to every process after a checkpoint: losses, answers and weights are those of a whole run.

    The model that begins is its own reference; with dropout, their distance would not be 0.
    """
    asked.add_rewards("killed-rewards", dropout=0.3, max_steps=60, save_steps=2, beta=0.05)
    work = asked.output("killed-rewards", f".{STAGE}.work", "")
    process = asked.start(SCRIPT, "--recipe", "killed-rewards")
    deadline = time.monotonic() + 240
    while not list(work.glob("checkpoints/checkpoint-*/manifest.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for child in reversed(descendants(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    process.communicate()
    assert not asked.output("killed-rewards", STAGE).exists()
    result = asked.run(SCRIPT, "--recipe", "killed-rewards")
    assert "continues from checkpoint-" in result.stdout
    continued = outcome(asked, "killed-rewards")
    assert len(continued[0]) == 60
    distances = [row["kl"] for row in asked.log("killed-rewards", STAGE) if "loss" in row]
    assert 0 <= distances[0] < 1e-6 < max(distances) and min(distances) >= 0
    asked.run(SCRIPT, "--recipe", "killed-rewards", "--force")
    assert outcome(asked, "killed-rewards") == continued


def outcome(project, recipe):
    """Of each step the loss, the mean reward, the tokens so far; and the bytes of the model."""
    keys = ("step", "loss", "reward", "tokens", "completions/mean_length")
    steps = [tuple(row[key] for key in keys) for row in project.log(recipe, STAGE) if "loss" in row]
    return steps, project.output(recipe, STAGE, "model.safetensors").read_bytes()


@pytest.mark.slow
def test_two_ranks_share_the_groups(asked):
    """A group of four is larger than what a rank answers at a time, so that every group is on both ranks."""
    asked.add_rewards("rewards-ddp", global_batch_size=16, per_device_train_batch_size=2)
    asked.run(SCRIPT, "--recipe", "rewards-ddp", "--nproc", "2", timeout=600)
    figures = asked.figures("rewards-ddp", STAGE)
    active = figures["active"]
    assert (active["parallel"], active["ranks"], active["global_batch"]) == ("DDP 2", 2, 16)
    assert (active["micro_batch"], active["accumulation"]) == (2, 4)
    assert figures["reward"] > figures["reward_before"] + 0.3


@pytest.mark.parametrize("option", [("--deepspeed", "zero2"), ("--fsdp",)])
def test_other_launchers_are_refused(asked, option):
    if not (asked.folder / "configs/rewards-refused").exists():
        asked.add_rewards("rewards-refused")
    command = (SCRIPT, "--recipe", "rewards-refused", "--nproc", "2", *option, "--dry-run")
    result = asked.run(*command, check=False)
    assert result.returncode == 2 and "--nproc" in result.stderr and option[0] in result.stderr
