"""Adapters and preferences on two ranks, under every launcher that works, reach the losses of one rank."""

import functools
import json

import pytest
from conftest import sentences

pytestmark = pytest.mark.slow

LORA = {"r": 4, "lora_alpha": 8}
PREFERENCE = {
    "pairs": {"mine": {"path": "preferences.jsonl"}},
    "valid_share": 0.2,
    "block_size": 128,
    "global_batch_size": 4,
    "per_device_train_batch_size": 4,
    "max_steps": 6,
    "learning_rate": 1e-3,
    "beta": 0.1,
    "logging_steps": 1,
    "save_steps": 3,
    "bf16": False,
}
# What is trained: its stage, and its changes of finetune.json and preference.json.
KINDS = {
    "adapter": ("12_finetune", {"lora": LORA}, None),
    "preferences": ("13_preference", {}, PREFERENCE),
    "preferences by an adapter": ("13_preference", {}, PREFERENCE | {"lora": LORA}),
}
WAYS = {
    "one": ((), "one process"),
    "ddp": (("--nproc", "2"), "DDP 2"),
    "zero2": (("--nproc", "2", "--deepspeed", "zero2"), "ZeRO-2"),
    "zero3": (("--nproc", "2", "--deepspeed", "zero3"), "ZeRO-3"),
}


@pytest.fixture(scope="module")
def train(make_project):
    """Train one of KINDS in one of WAYS, once for all tests; the project and the recipe's name."""
    project = make_project()
    rows = [
        {"prompt": f"{i}番は何ですか?", "chosen": text, "rejected": f"{i}番はわかりません。"}
        for i, text in enumerate(sentences(40, 5))
    ]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (project.folder / "preferences.jsonl").write_text(text, "utf-8")
    project.run("run_all.sh", "--recipe", "mini", "--to", "12")

    @functools.cache
    def trained(kind, way):
        stage, finetune, preference = KINDS[kind]
        name = f"{kind.replace(' ', '-')}-{way}"
        project.copy(name)
        project.edit(name, "finetune", **finetune)
        if preference:
            (project.folder / f"configs/{name}/preference.json").write_text(json.dumps(preference))
        project.run("run_all.sh", "--recipe", name, "--to", str(int(stage[:2]) - 1))
        script = "fine-tuning/12_finetune.sh" if stage.startswith("12") else "fine-tuning/13_preference.sh"
        # --force: train, do not reuse the equal stage of another launcher
        project.run(script, "--recipe", name, "--force", *WAYS[way][0], timeout=900)
        return name

    return project, trained


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "one"])
def test_ranks_together_reach_the_losses_of_one(train, kind, way):
    import torch
    from recipe.model.build import load_model

    project, trained = train
    stage = KINDS[kind][0]
    name, alone = trained(kind, way), trained(kind, "one")
    active = project.figures(name, stage)["active"]
    assert active["parallel"] == WAYS[way][1] and active["ranks"] == 2 and active["global_batch"] == 4
    found, expected = project.losses(name, stage), project.losses(alone, stage)
    assert len(found) == len(expected) == 6 and expected[-1] < expected[0]
    assert found == pytest.approx(expected, rel=1e-4)
    ids = torch.arange(5, 45).reshape(1, -1)
    with torch.inference_mode():  # the whole model was written, the adapter merged
        logits = [load_model(project.output(recipe, stage, "."))(ids).logits for recipe in (name, alone)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-2)
