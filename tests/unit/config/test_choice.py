"""The choice of precision, attention, compilation and loss for given hardware."""

from dataclasses import replace

import pytest
from recipe.config.choice import (
    AttentionNeeds,
    Choice,
    check_liger,
    check_quantization,
    choose,
    choose_loss,
    usable_attention,
)
from recipe.config.training import attention_needs
from recipe.hardware import Hardware
from recipe.project import Refused

TORCH = (2, 13)
A100 = Hardware("cuda", "A100", (8, 0), TORCH, True, (2,), True)
A100_WITHOUT_FLASH = replace(A100, flash_attention=())
A100_WITH_BITSANDBYTES = replace(A100, bitsandbytes=True)
A100_WITH_LIGER = replace(A100, liger=True)
ADA = replace(A100, name="RTX 4090", capability=(8, 9), torchao=True)
T4 = Hardware("cuda", "T4", (7, 5), TORCH, False, (), True)
P100 = Hardware("cuda", "P100", (6, 0), TORCH, False, (), False)
HOPPER = replace(A100, name="H100", capability=(9, 0), flash_attention=(2, 3))
ZEN4 = Hardware("cpu", "CPU", (0, 0), TORCH, True, (), True)
OLD_CPU = Hardware("cpu", "CPU", (0, 0), TORCH, False, (), False)


@pytest.mark.parametrize(
    ("hardware", "values", "expected"),
    [
        (A100, {}, Choice("bf16", "varlen", True)),
        (A100_WITHOUT_FLASH, {}, Choice("bf16", "varlen", True)),
        (T4, {}, Choice("fp16", "sdpa", True)),
        (ZEN4, {}, Choice("bf16", "documents", True)),
        (OLD_CPU, {}, Choice("fp32", "documents", False)),
        (A100, {"bf16": False}, Choice("fp32", "sdpa", True)),
        (A100, {"fp16": False}, Choice("bf16", "varlen", True)),
        (A100, {"bf16": False, "fp16": False}, Choice("fp32", "sdpa", True)),
        (T4, {"bf16": False}, Choice("fp16", "sdpa", True)),
        (T4, {"fp16": False}, Choice("fp32", "sdpa", True)),
        (ZEN4, {"fp16": False}, Choice("bf16", "documents", True)),
        (P100, {}, Choice("fp16", "sdpa", False)),
        (A100, {"fp16": True, "torch_compile": False}, Choice("fp16", "varlen", False)),
        (ZEN4, {"attn_implementation": "eager", "torch_compile": False}, Choice("bf16", "eager", False)),
        (ADA, {}, Choice("bf16", "varlen", True)),
        (ADA, {"fp8": True}, Choice("bf16", "varlen", True, fp8=True)),
    ],
)
def test_choice(hardware, values, expected):
    assert choose(hardware, values) == expected


@pytest.mark.parametrize(
    ("seen", "needs", "expected"),
    [
        (ZEN4, AttentionNeeds(), "documents"),
        (ZEN4, AttentionNeeds(dropout=True), "sdpa"),
        (ZEN4, AttentionNeeds(window=True), "sdpa"),
        (ZEN4, AttentionNeeds(padded=True), "sdpa"),
        (A100, AttentionNeeds(head_size=128), "varlen"),
        (A100, AttentionNeeds(window=True), "varlen"),
        (A100, AttentionNeeds(dropout=True), "sdpa"),
        (A100, AttentionNeeds(padded=True), "sdpa"),
        (A100, AttentionNeeds(head_size=36), "sdpa"),
        (A100, AttentionNeeds(head_size=288), "sdpa"),
        (replace(A100, torch=(2, 11)), AttentionNeeds(), "varlen"),
        (replace(A100, torch=(2, 10)), AttentionNeeds(), "sdpa"),
        (replace(A100, capability=(12, 0)), AttentionNeeds(), "varlen"),
        (T4, AttentionNeeds(), "sdpa"),
    ],
)
def test_the_kernel_that_is_chosen_computes_what_is_needed(seen, needs, expected):
    assert choose(seen, {}, needs=needs).attention == expected


@pytest.mark.parametrize(
    ("model", "file", "expected"),
    [
        ({"model_type": "qwen3"}, "pretrain", AttentionNeeds(head_size=128)),
        ({"model_type": "mistral", "sliding_window": 64}, "pretrain", AttentionNeeds(head_size=128)),
        (
            {"model_type": "mistral", "sliding_window": 32},
            "pretrain",
            AttentionNeeds(window=True, head_size=128),
        ),
        # As Qwen publishes it: a window that is not used.
        ({"model_type": "qwen2", "sliding_window": 32}, "pretrain", AttentionNeeds(head_size=128)),
        (
            {"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": True},
            "pretrain",
            AttentionNeeds(window=True, head_size=128),
        ),
        ({"model_type": "llama", "attention_dropout": 0.1}, "pretrain", AttentionNeeds(True, head_size=128)),
        ({"model_type": "gpt2"}, "finetune", AttentionNeeds(True, head_size=64)),
        ({"model_type": "gpt2", "attn_pdrop": 0.0, "n_embd": 96}, "finetune", AttentionNeeds(head_size=8)),
        ({"model_type": "qwen3", "head_dim": 48}, "preference", AttentionNeeds(padded=True, head_size=48)),
    ],
)
def test_what_the_attention_of_a_training_needs(model, file, expected):
    config = dict.fromkeys(("pretrain", "finetune", "preference"), {"block_size": 64}) | {"model": model}
    assert attention_needs(config, file) == expected


def test_nf4_needs_a_gpu_and_bitsandbytes():
    values = {"lora": {"quantization": "nf4"}}
    check_quantization(A100_WITH_BITSANDBYTES, values, "finetune.json")
    check_quantization(ZEN4, {"lora": None}, "finetune.json")
    for seen, missing in ((ZEN4, "no NVIDIA GPU"), (A100, "setup.sh --extra bitsandbytes")):
        with pytest.raises(Refused, match=rf"{missing}.*--set finetune.lora.quantization=null"):
            check_quantization(seen, values, "finetune.json")


@pytest.mark.parametrize(
    "name", ["sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"]
)
def test_other_kernels_are_a_choice_by_name(name):
    assert choose(HOPPER, {"attn_implementation": name}) == Choice("bf16", name, True)


@pytest.mark.parametrize(
    ("version", "needs", "reason"),
    [
        (2, AttentionNeeds(dropout=True), ""),
        (3, AttentionNeeds(dropout=True), "computes no dropout"),
        (3, AttentionNeeds(padded=True, window=True, head_size=256), ""),
        (2, AttentionNeeds(head_size=36), ""),
        (2, AttentionNeeds(head_size=288), "at most 256; model.json makes it 288"),
        (3, AttentionNeeds(head_size=36), "a multiple of 8"),
    ],
)
def test_flash_attention_is_refused_where_it_does_not_compute_what_is_needed(version, needs, reason):
    name = f"flash_attention_{version}"
    assert (name in usable_attention(HOPPER, needs, choose(HOPPER, {}, needs=needs))) == (not reason)
    if reason:
        with pytest.raises(Refused, match=f"{name} .*{reason}"):
            choose(HOPPER, {"attn_implementation": name}, needs=needs)


@pytest.mark.parametrize(
    ("hardware", "values", "words"),
    [
        (T4, {"bf16": True}, "T4 has no bf16.*fp16 is chosen"),
        (OLD_CPU, {"bf16": True}, "CPU has no bf16.*fp32 is chosen"),
        (ZEN4, {"fp16": True}, "needs a GPU"),
        (ZEN4, {"attn_implementation": "flash_attention_2"}, "needs an NVIDIA GPU"),
        (T4, {"attn_implementation": "flash_attention_2"}, "capability 8.0"),
        (A100, {"attn_implementation": "flash_attention_2", "bf16": False}, "fp32 is asked for"),
        (T4, {"attn_implementation": "documents"}, "documents is for CPUs; this is T4"),
        (OLD_CPU, {"torch_compile": True}, r"no g\+\+"),
        (P100, {"torch_compile": True}, "capability 7.0 or more; this is P100"),
        (P100, {"attn_implementation": "flex_attention"}, "capability 7.0 or more; this is P100"),
        (T4, {"tf32": True}, "capability 8.0 or more; this is T4"),
        (A100, {"attn_implementation": "flash_attention_3"}, "capability 9.0"),
        (A100, {"attn_implementation": "flash_attention_4"}, r"flash_attn\.cute installed"),
        (ZEN4, {"attn_implementation": "varlen"}, "needs an NVIDIA GPU"),
        (T4, {"attn_implementation": "varlen"}, "capability 8.0"),
        (A100, {"attn_implementation": "varlen", "bf16": False}, "fp32 is asked for"),
        (replace(A100, torch=(2, 10)), {"attn_implementation": "varlen"}, "this is 2.10"),
        (ZEN4, {"attn_implementation": "flex_attention"}, "no gradient on a CPU"),
        (replace(A100, compiler=False), {"attn_implementation": "flex_attention"}, r"no g\+\+"),
        (ZEN4, {"fp8": True}, "capability 8.9 or more; this is CPU"),
        (replace(A100, torchao=True), {"fp8": True}, "capability 8.9 or more; this is A100"),
        (replace(ADA, torchao=False), {"fp8": True}, "setup.sh --extra torchao"),
        (ADA, {"fp8": True, "fp16": True}, "fp16 is asked for"),
        (ADA, {"fp8": True, "torch_compile": False}, "no torch.compile"),
        (replace(ADA, compiler=False), {"fp8": True}, "no torch.compile"),
    ],
)
def test_impossible_value_is_refused(hardware, values, words):
    with pytest.raises(Refused, match=words) as caught:
        choose(hardware, values, "finetune.json")
    assert str(caught.value).startswith(f"finetune.json: {next(iter(values))}: ")


@pytest.mark.parametrize(
    ("device", "positions", "vocabulary", "compiled", "tensor_parallel", "expected"),
    [
        ("cuda", 16 * 1024, 32_000, False, 1, "chunks"),
        ("cuda", 16 * 1024, 32_000, True, 1, "whole logits"),
        ("cuda", 4 * 1024, 32_000, False, 1, "whole logits"),
        ("cuda", 8 * 1024, 32_768, False, 1, "chunks"),
        ("cuda", 32 * 1024, 50_000, True, 1, "chunks"),
        ("cuda", 16 * 1024, 32_000, False, 2, "whole logits"),
        ("cpu", 16 * 1024, 32_000, False, 1, "whole logits"),
    ],
)
def test_many_logits_are_never_held_on_a_gpu(
    device, positions, vocabulary, compiled, tensor_parallel, expected
):
    assert choose_loss(device, positions * vocabulary, compiled, tensor_parallel) == expected


@pytest.mark.parametrize(
    ("hardware", "model_type", "sharded", "where", "reason"),
    [
        (ZEN4, "mistral", False, "pretrain.json", "for GPUs; this is CPU"),
        (A100, "mistral", False, "pretrain.json", "liger-kernel is not installed"),
        (A100_WITH_LIGER, "gpt2", False, "pretrain.json", "no kernels for gpt2, only for llama, mistral"),
        (A100_WITH_LIGER, "mistral", True, "pretrain.json", "--fsdp and --tensor-parallel split"),
        (A100_WITH_LIGER, "mistral", False, "preference.json", "not of preferences"),
    ],
)
def test_liger_is_refused_where_it_cannot_work(hardware, model_type, sharded, where, reason):
    with pytest.raises(Refused, match=f"{where}: use_liger_kernel: true, but .*{reason}.*Leave the key out"):
        check_liger(hardware, {"use_liger_kernel": True}, model_type, sharded, where)
    check_liger(hardware, {}, model_type, sharded, where)
    check_liger(A100_WITH_LIGER, {"use_liger_kernel": True}, "mistral", False, "pretrain.json")


@pytest.mark.parametrize(
    ("hardware", "needs", "expected"),
    [
        (ZEN4, AttentionNeeds(), ["sdpa"]),
        (A100, AttentionNeeds(), ["flex_attention", "flash_attention_2", "sdpa"]),
        (T4, AttentionNeeds(), ["flex_attention"]),
        (A100_WITHOUT_FLASH, AttentionNeeds(dropout=True), []),
    ],
)
def test_the_kernels_that_a_probe_compares_with_the_chosen_one(hardware, needs, expected):
    assert usable_attention(hardware, needs, choose(hardware, {}, needs=needs)) == expected
