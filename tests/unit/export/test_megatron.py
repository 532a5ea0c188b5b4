"""Arguments, token files and weights for Megatron-LM, tested with megatron-core itself on a CPU."""

import argparse

import pytest
import torch
import torch.distributed as dist
from conftest import SHAPE
from recipe.export import megatron
from recipe.project import RecipeError, Refused
from recipe.tokenization.token_files import write_token_file
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

GROUPED = SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 90}
ROPE = {"rope_type": "default", "rope_theta": 500000.0}


def config_of(kind, **values):
    return AutoConfig.for_model(kind, **GROUPED | {"rope_parameters": ROPE, "rms_norm_eps": 1e-5} | values)


def their_model(arguments, vocab_size):
    """megatron-core's GPT model as Megatron-LM builds it from these arguments."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import TransformerConfig

    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name, value in arguments.items():
        flag = {"action": "store_true"} if value is None else {"type": type(_number(value))}
        parser.add_argument(name, **flag)
    words = [word for name, value in arguments.items() for word in (name, value) if word is not None]
    given = parser.parse_args(words)
    assert given.swiglu and given.disable_bias_linear and given.group_query_attention
    qk_norm = getattr(given, "qk_layernorm", False)
    config = TransformerConfig(
        num_layers=given.num_layers,
        hidden_size=given.hidden_size,
        ffn_hidden_size=given.ffn_hidden_size,
        num_attention_heads=given.num_attention_heads,
        num_query_groups=given.num_query_groups,
        kv_channels=given.kv_channels,
        normalization=given.normalization,
        layernorm_epsilon=given.norm_epsilon,
        qk_layernorm=qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=given.attention_dropout,
        hidden_dropout=given.hidden_dropout,
        use_cpu_initialization=True,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=qk_norm, normalization=given.normalization),
        vocab_size=vocab_size,
        max_sequence_length=given.max_position_embeddings,
        position_embedding_type=given.position_embedding_type,
        rotary_base=given.rotary_base,
        share_embeddings_and_output_weights=not getattr(given, "untie_embeddings_and_output_weights", False),
    )


def _number(text):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def copy_weights(ours, theirs, groups):
    """In Megatron-LM's layout: queries, keys and values of a group together, gate before up."""
    state = ours.state_dict()
    pairs = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        "output_layer.weight": "lm_head.weight",
    }
    new = {there: state[here] for there, here in pairs.items()}
    for layer in range(ours.config.num_hidden_layers):
        here, there = f"model.layers.{layer}", f"decoder.layers.{layer}"
        parts = [state[f"{here}.self_attn.{kind}_proj.weight"].unflatten(0, (groups, -1)) for kind in "qkv"]
        new[f"{there}.self_attention.linear_qkv.weight"] = torch.cat(parts, 1).flatten(0, 1)
        new[f"{there}.mlp.linear_fc1.weight"] = torch.cat(
            [state[f"{here}.mlp.{kind}_proj.weight"] for kind in ("gate", "up")]
        )
        for mine, yours in {
            "self_attn.o_proj": "self_attention.linear_proj",
            "mlp.down_proj": "mlp.linear_fc2",
            "input_layernorm": "input_layernorm",
            "post_attention_layernorm": "pre_mlp_layernorm",
            "self_attn.q_norm": "self_attention.q_layernorm",
            "self_attn.k_norm": "self_attention.k_layernorm",
        }.items():
            if f"{here}.{mine}.weight" in state:
                new[f"{there}.{yours}.weight"] = state[f"{here}.{mine}.weight"]
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(new[name])


@pytest.fixture
def one_rank(tmp_path, monkeypatch):
    from megatron.core import parallel_state

    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")  # it is called on a CPU, too
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.mark.extra("megatron")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_megatron_model_of_these_arguments_is_the_same_model(one_rank, kind, tied):
    config = config_of(kind, tie_word_embeddings=tied)
    torch.manual_seed(0)
    ours = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # weights large enough for every part to matter
        for parameter in ours.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    theirs = their_model(megatron.arguments_for(config, 32), config.vocab_size).eval()
    copy_weights(ours, theirs, config.num_key_value_heads)
    ids = torch.randint(config.vocab_size, (2, 32))
    hidden_from = torch.triu(torch.ones(1, 1, 32, 32, dtype=torch.bool), 1)
    with torch.no_grad():
        expected = ours(ids).logits
        found = theirs(ids, torch.arange(32)[None].expand(2, -1), hidden_from)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("values", "sizes", "fault"),
    [
        ({"hidden_act": "gelu"}, {}, "hidden_act: gelu"),
        ({"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}}, {}, "rope_type linear"),
        ({"attention_bias": True}, {}, "attention_bias"),
        ({}, {"tensor": 4}, "--tensor-parallel 4 does not divide 2 key-value heads"),
        ({}, {"pipeline": 3}, "--pipeline-parallel 3 does not divide 2 layers"),
    ],
)
def test_a_model_that_megatron_does_not_support_is_refused(values, sizes, fault):
    megatron.arguments_for(config_of("llama"), 32, 2, 2)
    with pytest.raises(Refused, match=fault):
        megatron.arguments_for(config_of("llama", **values), 32, **sizes)


def test_a_sliding_window_is_accepted_only_when_it_has_no_effect():
    megatron.arguments_for(config_of("mistral", sliding_window=64), 64)
    with pytest.raises(Refused, match="sliding_window: 64 is less than the 65 tokens"):
        megatron.arguments_for(config_of("mistral", sliding_window=64), 65)


def test_gpt2_is_refused():
    with pytest.raises(Refused, match="model_type: gpt2"):
        megatron.arguments_for(AutoConfig.for_model("gpt2"), 32)


@pytest.mark.extra("megatron")
def test_token_files_are_read_by_megatron_core(tmp_path):
    documents = [[2, *range(10, 10 + n), 3] for n in (1, 7, 30, 4, 90)]
    write_token_file(tmp_path / "train", iter(documents), 8000)
    assert megatron.check_tokens(tmp_path / "train", 8000) == (5, sum(map(len, documents)))
    with pytest.raises(RecipeError, match="document 4 has other ids .* beyond the 90"):
        megatron.check_tokens(tmp_path / "train", 90)  # id 99 is outside such a vocabulary


@pytest.mark.parametrize("kind", megatron.MODEL_TYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_checked_by_name_and_shape(tmp_path, kind, tied):
    config = config_of(kind, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    assert megatron.check_weights(tmp_path, config) == len(list(model.parameters()))
    config.intermediate_size += 1
    with pytest.raises(Refused, match=r"6 weights .*mlp.down_proj.weight: \(32, 64\), expected \(32, 65\)"):
        megatron.check_weights(tmp_path, config)
    config.intermediate_size -= 1
    save_file({"extra": torch.ones(1)}, tmp_path / "more.safetensors")
    with pytest.raises(Refused, match=r"1 weights .*extra: \(1,\), expected none"):
        megatron.check_weights(tmp_path, config)
