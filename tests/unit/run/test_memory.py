"""The computed memory of a step, against transformers' models, published figures and ZeRO's formulas."""

import dataclasses

import pytest
from recipe.config.known_keys import MODEL_TYPES
from recipe.config.model import DEFAULTS
from recipe.run.memory import activation_bytes, activation_table, memory, shape_of
from recipe.run.plan import model_of
from shapes import PLAIN, SHIPPED, SMALL, read

# Numbers of parameters that the authors have published, each with the vocabulary it belongs to.
PUBLISHED = {
    "mistral-300m": (354_894_848, 50_000),
    "mistral-39m": (48_503_296, 32_000),
    "gpt2-medium-aozora": (336_128_000, 32_000),
    "gpt2-small": (108_882_432, 30_000),
    "gpt2-xl": (1_557_200_000, 50_000),
}


EXPERTS = {"num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}


def on_meta(model, vocabulary):
    """The model that transformers builds, without memory for its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(model)
    config = AutoConfig.for_model(values.pop("model_type"), **values | {"vocab_size": vocabulary})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def assert_counted(model, vocabulary):
    from recipe.model.build import active_parameter_count, flops_per_token, parameter_count

    shape, real = shape_of(model, vocabulary), on_meta(model, vocabulary)
    assert shape.parameters == parameter_count(real)
    assert shape.active_parameters == active_parameter_count(real)
    assert shape.flops_per_token(100) == flops_per_token(real, 100)


@pytest.mark.parametrize("recipe", SHIPPED)
def test_parameters_of_every_recipe(recipe):
    assert_counted(read(recipe, "model"), PUBLISHED.get(recipe, (0, 32_000))[1])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2, "tie_word_embeddings": True},
        {"head_dim": 24, "attention_bias": True, "mlp_bias": True},
        {"model_type": "mistral", "head_dim": 8},
        {"model_type": "qwen3", "num_key_value_heads": 1, "attention_bias": True},
        {"model_type": "qwen3", "head_dim": 32, "num_key_value_heads": 2},
        {"model_type": "qwen3", "num_key_value_heads": None},
        {"model_type": "qwen2"},
        {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
        {"model_type": "olmo2"},
        {"model_type": "olmo2", "num_key_value_heads": 2, "attention_bias": True},
        {"model_type": "gemma3_text"},
        {"model_type": "gemma3_text", "head_dim": 24, "num_key_value_heads": 2, "attention_bias": True},
        {"model_type": "qwen3_moe"} | EXPERTS,
        {"model_type": "qwen3_moe", "decoder_sparse_step": 2, "num_hidden_layers": 5} | EXPERTS,
        {"model_type": "qwen3_moe", "mlp_only_layers": [1], "head_dim": 24} | EXPERTS,
        {"model_type": "gpt_neox"},
        {"model_type": "gpt_neox", "attention_bias": False, "tie_word_embeddings": True},
        {"model_type": "gpt2", "n_inner": 100, "n_positions": 77},
        {"model_type": "gpt2", "tie_word_embeddings": False, "n_inner": None},
    ],
)
def test_parameters_of_every_architecture(changes):
    model = SMALL | changes
    if model["model_type"] == "gpt2":
        model = {"n_embd": 64, "n_layer": 2, "n_head": 4} | changes
    assert_counted(model, 1000)


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_parameters_are_the_published_ones(recipe):
    count, vocabulary = PUBLISHED[recipe]
    assert shape_of(read(recipe, "model"), vocabulary).parameters == count


def test_defaults_are_those_of_transformers():
    from transformers import AutoConfig

    assert set(DEFAULTS) == set(MODEL_TYPES) == set(activation_table())
    for kind, values in DEFAULTS.items():
        config = AutoConfig.for_model(kind)
        assert {name: getattr(config, name) for name in values} == values
        assert bool(getattr(config, "tie_word_embeddings", False)) == values.get("tie_word_embeddings", False)


@pytest.mark.parametrize("kind", ["mistral", "qwen3", "gpt2", "gemma3_text", "qwen3_moe"])
@pytest.mark.parametrize("mode", ["mixed", "fp32", "half"])
def test_activations_are_what_a_model_keeps(kind, mode):
    """The table, made from other shapes, against the tensors that PyTorch keeps for the backward pass."""
    from recipe.run.activations import ROWS, bytes_per_token

    hidden, query, key, intermediate, block = 160, 256 if kind != "gpt2" else 160, 64, 480, 80
    kept = bytes_per_token(kind, mode, (hidden, query, key, intermediate, 3), block)
    precision = "fp32" if mode == "fp32" else "bf16"
    if kind == "gpt2":
        model = {"n_embd": hidden, "n_layer": 3, "n_head": 5, "n_inner": intermediate, "attn_pdrop": 0.0}
    else:
        model = SMALL | {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 3}
        model |= {"num_attention_heads": query // 32, "num_key_value_heads": key // 32, "head_dim": 32}
    if kind == "qwen3_moe":
        model |= {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": intermediate // 3}
    setting = dataclasses.replace(
        PLAIN, block_size=block, micro_batch=ROWS, precision=precision, zero=int(mode == "half")
    )
    computed = activation_bytes(shape_of(model | {"model_type": kind}, 100), setting)
    assert computed == pytest.approx(3 * ROWS * block * kept, rel=0.01)


@pytest.mark.parametrize("kind", ["mistral", "qwen3"])
@pytest.mark.parametrize("mode", ["mixed", "fp32"])
def test_a_cpu_keeps_no_attention_mask(kind, mode, monkeypatch):
    """The attention that a CPU trains with, against its formula. Keys are as wide as queries here."""
    from recipe.run import activations

    def with_documents(*arguments):
        model = small_model(*arguments)
        model.set_attn_implementation("documents")
        return model

    small_model, width, block = activations.small_model, 128, 320
    monkeypatch.setattr(activations, "small_model", with_documents)
    kept = activations.bytes_per_token(kind, mode, (160, width, width, 480, 1), block)
    model = SMALL | {"model_type": kind, "hidden_size": 160, "intermediate_size": 480, "head_dim": width // 4}
    precision = "fp32" if mode == "fp32" else "bf16"
    setting = dataclasses.replace(PLAIN, device="cpu", block_size=block, micro_batch=1, precision=precision)
    shape = shape_of(model | {"num_hidden_layers": 1, "num_key_value_heads": 4}, 100)
    assert activation_bytes(shape, setting) == pytest.approx(block * kept, rel=0.01)
    dropped = dataclasses.replace(shape, attention_dropout=0.1)
    mask = activation_table()[kind][mode][-1]
    assert activation_bytes(dropped, setting) - activation_bytes(shape, setting) == pytest.approx(
        block * ((mask + 12 * shape.heads) * block + 6 * shape.hidden)
    )


def states(shape, **changes):
    parts = memory(shape, dataclasses.replace(PLAIN, **changes))
    return parts["weights"] + parts["gradients"] + parts["optimizer"]


def test_bytes_per_parameter_by_zero_stage():
    shape = shape_of(SMALL, 1000)
    for ranks in (1, 2, 8, 64):
        count = shape.parameters
        assert states(shape, ranks=ranks) == 16 * count
        assert states(shape, ranks=ranks, zero=1) == pytest.approx((4 + 12 / ranks) * count)
        assert states(shape, ranks=ranks, zero=2) == pytest.approx((2 + 14 / ranks) * count)
        assert states(shape, ranks=ranks, zero=3) == pytest.approx(16 / ranks * count)
        assert states(shape, ranks=ranks, fsdp=True) == pytest.approx(16 / ranks * count)
        split = states(shape, ranks=ranks, tensor_parallel=ranks)
        assert split == pytest.approx(16 * ((count - shape.vectors) / ranks + shape.vectors))
    both = states(shape, ranks=8, fsdp=True, tensor_parallel=2)
    assert both == states(shape, ranks=2, tensor_parallel=2) / 4
    assert states(shape, precision="fp32") == states(shape, zero=1, precision="fp32") == 16 * count
    assert states(shape, optimizer="sgd") == 8 * count
    assert states(shape, optimizer="rmsprop") == states(shape, optimizer="lion_32bit") == 12 * count
    assert states(shape, optimizer="sgd", zero=1) == states(shape, zero=1) - 8 * count
    assert states(shape, optimizer="muon") == 16 * count - 4 * shape.matrices
    eight_bit = states(shape, optimizer="adamw_8bit")
    assert eight_bit == 10 * count + 6 * (shape.embeddings + shape.vectors)


def test_only_gathered_weights_fragment_the_heap():
    """On CPUs under ZeRO-3 and FSDP2. For a GPU, the allocator's reserve is part of the process."""
    shape = shape_of(SMALL, 1000)
    for zero, fsdp, device, share in (
        (0, False, "cpu", 0),
        (2, False, "cpu", 0),
        (3, False, "cpu", 0.15),
        (0, True, "cpu", 0.15),
        (3, False, "cuda", 0),
    ):
        parts = memory(shape, dataclasses.replace(PLAIN, ranks=2, zero=zero, fsdp=fsdp, device=device))
        assert parts["fragmentation"] == pytest.approx(share * (parts["peak"] - parts["fragmentation"]))


def test_experts_fragment_the_heap_of_one_process():
    """A CPU that multiplies in 16 bits, against the peak of 150 steps of tests/bench/experts.py."""
    setting = dataclasses.replace(
        PLAIN, device="cpu", block_size=256, micro_batch=16, compiled=True, optimizer="muon"
    )
    dense, experts = (shape_of(model_of(4, count), 8000) for count in (0, 8))
    assert memory(experts, setting)["peak"] == pytest.approx(1.79 * 2**30, rel=0.1)
    assert memory(dense, setting)["peak"] == pytest.approx(0.97 * 2**30, rel=0.01)
    assert memory(dense, setting)["fragmentation"] == 0
    for changes in ({"ranks": 2}, {"precision": "fp32"}, {"device": "cuda"}):
        assert memory(experts, dataclasses.replace(setting, **changes))["fragmentation"] == 0


def test_offloading_moves_to_the_host():
    shape = shape_of(SMALL, 1000)
    kept = memory(shape, dataclasses.replace(PLAIN, ranks=4, zero=3))
    moved = memory(shape, dataclasses.replace(PLAIN, ranks=4, zero=3, offload_optimizer=True))
    assert kept["host"] == 0 and moved["optimizer"] == 0
    assert moved["host"] == kept["optimizer"] == 12 * shape.parameters / 4
    assert kept["peak"] - moved["peak"] == pytest.approx(moved["host"])


def test_every_saving_lowers_the_peak():
    shape = shape_of(read("mistral-300m", "model"), 50_000)
    whole = memory(shape, PLAIN)["peak"]
    for changes in ({"micro_batch": 2}, {"checkpointing": True}, {"compiled": True}, {"block_size": 512}):
        assert memory(shape, dataclasses.replace(PLAIN, **changes))["peak"] < whole
    # The gradients of the first micro-batch exist during the forward pass of the second one.
    assert memory(shape, dataclasses.replace(PLAIN, accumulation=2))["peak"] - whole == pytest.approx(
        4 * shape.parameters
    )
    assert memory(shape, dataclasses.replace(PLAIN, ranks=2))["peak"] > whole  # DDP's buckets


def test_gpt_neox_keeps_its_embeddings_whole_under_tensor_parallelism():
    shape = shape_of(SMALL | {"model_type": "gpt_neox"}, 1000)
    assert shape.of_rank(4) == shape.embeddings + shape.vectors + (shape.matrices + shape.output) / 4


def test_fsdp_keeps_gradients_whole_while_it_accumulates():
    shape = shape_of(SMALL, 1000)
    once, twice = (dataclasses.replace(PLAIN, ranks=8, fsdp=True, accumulation=n) for n in (1, 2))
    more = memory(shape, twice)["peak"] - memory(shape, once)["peak"]
    assert more == pytest.approx(4 * shape.parameters)


def test_tensor_parallelism_splits_what_is_as_wide_as_heads():
    shape = shape_of(SMALL, 1000)
    one, two = (dataclasses.replace(PLAIN, ranks=2, tensor_parallel=n) for n in (1, 2))
    hidden, *wide, mask = activation_table()["llama"]["mixed"]
    split = sum(f * size for f, size in zip(wide, (shape.query, shape.key, shape.intermediate), strict=True))
    tokens = PLAIN.micro_batch * PLAIN.block_size * shape.layers
    assert activation_bytes(shape, one) - activation_bytes(shape, two) == tokens * split / 2
    assert memory(shape, one)["logits"] == memory(shape, two)["logits"]


def test_a_gpu_holds_the_logits_of_a_chunk_only():
    """At 16 x 1024 positions and a vocabulary of 32,000; at 4 x 1024 all logits are small enough."""
    shape = shape_of(read("mistral-300m", "model"), 32_000)
    few, many = (memory(shape, dataclasses.replace(PLAIN, micro_batch=size))["logits"] for size in (4, 16))
    assert few == 16 * 4 * 1024 * 32_000
    assert many == 8 * 2**25 + 8 * 32_000 * shape.hidden < few / 3
    split = dataclasses.replace(PLAIN, ranks=2, micro_batch=16, tensor_parallel=2)
    assert memory(shape, split)["logits"] == 4 * few
    capped = shape_of(SMALL | {"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, 32_000)
    assert memory(capped, dataclasses.replace(PLAIN, micro_batch=16))["logits"] == 4 * few


def test_every_second_layer_is_between_none_and_all():
    shape = shape_of(read("mistral-300m", "model"), 32_000)
    none, second, every = (
        activation_bytes(shape, dataclasses.replace(PLAIN, checkpointing=each)) for each in (0, 2, 1)
    )
    layer, inputs = none / shape.layers, 4 * shape.hidden * 4 * 1024
    assert second == pytest.approx(12 * inputs + 13 * layer)
    assert every == pytest.approx(24 * inputs + layer)
