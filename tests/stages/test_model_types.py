"""Types of models that no recipe here has, through the stages: from scratch and from published weights."""

import json
import math

import pytest
from published_checkpoint import SMALL, write_checkpoint, write_qwen2_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow

TYPES = ["qwen2", "olmo2", "gemma3_text", "qwen3_moe"]


def check_stages(project, kind):
    """It was trained, evaluated and tuned, and the exported folder is the tuned model."""
    trained = project.figures("mini", "05_pretrain")
    # Gemma's window is shorter than the block, which only PyTorch's attention computes on a CPU.
    windowed = kind == "gemma3_text"
    assert trained["active"]["attention"] == ("sdpa" if windowed else "documents")
    losses = project.losses("mini")
    assert losses[-1] < losses[0]
    measured = project.figures("mini", "06_evaluate")["in_domain"]["bits_per_byte"]
    assert math.isfinite(measured) and measured > 0
    folder = project.output("mini", "16_export", ".")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == kind
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "山は?"}], return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=2).shape[1] > ids["input_ids"].shape[1]
    return trained


@pytest.mark.parametrize("kind", TYPES)
def test_from_scratch_to_the_export(make_project, kind):
    project = make_project()
    (project.folder / "configs/mini/model.json").write_text(json.dumps({"model_type": kind} | SMALL[kind]))
    if kind == "qwen2":  # which has a tokenizer of its own
        write_qwen2_tokenizer(project.folder)
        tokenizer = {"kind": "published", "published": "."}
        (project.folder / "configs/mini/tokenizer.json").write_text(json.dumps(tokenizer))
    project.run("run_all.sh", "--recipe", "mini")
    check_stages(project, kind)


@pytest.mark.parametrize("kind", TYPES)
def test_from_published_weights_to_the_export(make_project, kind):
    project = make_project()
    write_checkpoint(project.folder / "published", kind, rows=320)
    (project.folder / "configs/mini/model.json").unlink()
    tokenizer = {"kind": "published", "published": "published", "new_pieces": 30, "round_to": 16}
    (project.folder / "configs/mini/tokenizer.json").write_text(json.dumps(tokenizer))
    project.edit("mini", "pretrain", initial_model="published")
    project.run("run_all.sh", "--recipe", "mini")
    trained = check_stages(project, kind)
    assert trained["initial_model"]["new_pieces"] >= 30
