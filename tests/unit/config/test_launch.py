"""DeepSpeed files, and what this machine must have for a training."""

import json
import os
import subprocess
import sys

import pytest
from recipe.config import launch
from recipe.project import CONFIGS, Refused


@pytest.mark.parametrize("name", [path.stem for path in (CONFIGS / "deepspeed").glob("*.json")])
def test_shipped_deepspeed_file_is_valid(name):
    launch.check_deepspeed(name)


def test_deepspeed_scheduler_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "CONFIGS", tmp_path)
    (tmp_path / "deepspeed").mkdir()
    path = tmp_path / "deepspeed/mine.json"
    path.write_text('{"scheduler": {"type": "WarmupLR"}}')
    with pytest.raises(Refused, match="silently replace the Trainer's"):
        launch.check_deepspeed("mine")
    path.write_text('{"zero_optimization": {"stage": 2, "overlap_com": true}}')
    with pytest.raises(Refused, match="'overlap_comm'"):
        launch.check_deepspeed("mine")


ZERO2 = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2},
}
BATCHES = {"global_batch_size": 8, "per_device_train_batch_size": 2, "block_size": 64}


def test_a_deepspeed_file_without_zero_shards_nothing_of_an_adapter(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "CONFIGS", tmp_path)
    (tmp_path / "deepspeed").mkdir()
    plain = {key: value for key, value in ZERO2.items() if key != "zero_optimization"}
    (tmp_path / "deepspeed/mine.json").write_text(json.dumps(plain))
    lora = {"lora": {"r": 4, "quantization": "nf4"}}
    assert launch.check_launch(BATCHES | lora, "finetune", "mine", 2).name == "mine.json"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_batch_size": 8, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0}, ""),
        ({"train_batch_size": 16}, r"train_batch_size: 16, but .* make it 8\. Write \"auto\""),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps: 1, but .* make it 2"),
        ({"gradient_clipping": 0.5}, "gradient_clipping: 0.5, but .* make it 1.0"),
        ({"gradient_clipping": None}, "gradient_clipping: null"),
        ({"bf16": {"enabled": True}}, "bf16.enabled: true"),
        ({"bf16": None}, "bf16.enabled: null"),
        ({"activation_checkpointing": {}}, "activation_checkpointing: only models written for it"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage3_gather_16bit_weights_on_model_save"),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": True}},
            'zero_optimization: cpu_offload: true: DeepSpeed no longer reads it. Write "offload_optimizer"',
        ),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": None, "offload_param": None}}, ""),
        ({"zero_optimization": {"stage": "3"}}, 'zero_optimization: stage: "3" is str, expected int'),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization: stage: 4, expected 0, 1, 2 or 3"),
        (
            {"zero_optimization": {"reduce_bucket_size": "200MB"}},
            'zero_optimization: reduce_bucket_size: "200MB", expected a number above 0, or "auto"',
        ),
        ({"gradient_clipping": float("nan")}, "gradient_clipping: nan, expected a finite number"),
        ({"optimizer": {"type": "Adam"}}, "optimizer: it would silently replace"),
    ],
)
def test_deepspeed_file_that_says_otherwise_is_refused(tmp_path, monkeypatch, change, words):
    monkeypatch.setattr(launch, "CONFIGS", tmp_path)
    (tmp_path / "deepspeed").mkdir()
    values = {key: value for key, value in (ZERO2 | change).items() if value is not None}
    (tmp_path / "deepspeed/mine.json").write_text(json.dumps(values))
    if not words:
        assert launch.check_launch(BATCHES, "pretrain", "mine", 2).name == "mine.json"
        return
    with pytest.raises(Refused, match=f"configs/deepspeed/mine.json: {words}"):
        launch.check_launch(BATCHES, "pretrain", "mine", 2)


def test_what_the_hardware_lacks_is_refused_before_torch_is_imported():
    """By file and key, from the check that run_all.sh starts with: there is no GPU."""
    for key, value, words in (
        ("attn_implementation", "flash_attention_2", "needs an NVIDIA GPU"),
        ("fp16", True, "needs a GPU"),
        ("tf32", True, "capability 8.0"),
        ("optim", "adamw_bnb_8bit", "NVIDIA GPU"),
    ):
        code = (
            "import sys; from recipe.run import check\n"
            "sys.argv = ['check', '--set', 'pretrain.muon_learning_rate=null', '--set', sys.argv[1]]\n"
            "try:\n    check.main()\nfinally:\n    print('torch' in sys.modules)"
        )
        result = subprocess.run(
            [sys.executable, "-c", code, f"pretrain.{key}={json.dumps(value)}"],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 2 and result.stdout == "False\n", result.stderr
        assert (
            result.stderr.startswith(f"run_all.sh: error: pretrain.json: {key}: ") and words in result.stderr
        )


def test_heads_that_the_model_file_leaves_out_are_split_too():
    launch.check_tensor_parallel({"model_type": "qwen3", "num_attention_heads": 12}, 32)
    with pytest.raises(Refused, match="the 8 key-value heads of model.json"):
        launch.check_tensor_parallel({"model_type": "mistral"}, 3)


MISTRAL = {"model_type": "mistral", "hidden_size": 64}


@pytest.mark.parametrize(
    ("model", "block", "launched", "reason"),
    [
        (MISTRAL, 64, ("zero2", False, 1), "not with --deepspeed"),
        (MISTRAL, 64, (None, True, 1), "not with --fsdp"),
        (MISTRAL, 64, (None, False, 2), "not with --tensor-parallel"),
        ({"model_type": "gpt2"}, 64, (None, False, 1), "gpt2 keeps its matrices in Conv1D"),
        ({"model_type": "qwen3_moe"}, 64, (None, False, 1), "qwen3_moe keeps its experts"),
        (MISTRAL | {"hidden_size": 72}, 64, (None, False, 1), "hidden_size 72, .*multiple of 16"),
        (MISTRAL, 72, (None, False, 1), "block_size is 72, .*multiple of 16"),
    ],
)
def test_fp8_is_refused_where_it_cannot_work(model, block, launched, reason):
    with pytest.raises(Refused, match=f"pretrain.json: fp8: true, but .*{reason}"):
        launch.check_fp8(model, {"fp8": True, "block_size": block}, *launched)
    launch.check_fp8(model, {"block_size": block}, *launched)
    launch.check_fp8(MISTRAL, {"fp8": True, "block_size": 64}, None, False, 1)
