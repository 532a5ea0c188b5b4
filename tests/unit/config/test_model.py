"""The keys of model.json."""

import functools

import pytest
from recipe.config.recipe import check_recipe
from refusal import refusal, tiny

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
SIZES += ("num_key_value_heads",)
ROPE = {"rope_type": "default", "rope_theta": 1e4}


def other(kind, **values):
    """A change of a recipe: its model becomes one of another type, of the same sizes, with these values."""

    def change(recipe):
        shape = {key: recipe["model"][key] for key in SIZES}
        recipe["model"] = {"model_type": kind} | shape | values

    return change


gemma = functools.partial(other, "gemma3_text")
experts = functools.partial(other, "qwen3_moe", num_experts=8, num_experts_per_tok=2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["model"].update(num_key_value_heads=2), ["does not divide by num_key_value_heads 2"]),
        (lambda c: c["model"].update(model_type="mistrall"), ["model_type", "'mistral'"]),
        (
            lambda c: (c["model"].pop("head_dim"), c["model"].update(model_type="mistral", hidden_size=260)),
            ["model.json: hidden size 260 does not divide by 3"],
        ),
        (lambda c: c["model"].update(hidden_size=10**11), ["hidden_size: 100000000000", "1,000,000"]),
        (lambda c: c["model"].update(num_hidden_layers=0), ["num_hidden_layers: 0", "from 1 to 1,000,000"]),
        (lambda c: c["model"].update(dtype="bfloat16"), ['model.json: dtype: "bfloat16"', "float32"]),
        (
            lambda c: (c["model"].pop("head_dim"), c["model"].update(model_type="qwen2")),
            ['model_type: "qwen2"', "trains a tokenizer", '"kind": "published"', '"model_type": "qwen3"'],
        ),
        (gemma(attn_logit_softcapping=50.0), ["attn_logit_softcapping: 50.0", "leave the key out"]),
        (gemma(use_bidirectional_attention=True), ["use_bidirectional_attention: true, expected false"]),
        (gemma(hidden_size=260), ["hidden size 260 does not divide by 3"]),
        (
            gemma(rope_parameters=ROPE),
            ["rope_parameters: {", "both kinds of layers", "full_attention and sliding"],
        ),
        (
            lambda c: c.update(model={"model_type": "qwen3", "num_attention_heads": 12}),
            ["num_attention_heads: 12 does not divide by num_key_value_heads 32", "the default of"],
        ),
        (
            lambda c: c.update(model={"model_type": "gpt2", "n_embd": 500}),
            ["hidden size 500 does not divide by 12 attention heads"],
        ),
        (
            lambda c: c["model"].update(rope_theta=2e4, rope_parameters=ROPE),
            ["rope_theta: 20000.0 would have no effect here. Write it into rope_parameters"],
        ),
        (
            lambda c: c.update(model={"model_type": "gpt_neox", "rope_theta": 2e4}),
            ["rope_theta: 20000.0 would have no effect here. Write it into rope_parameters"],
        ),
        (
            lambda c: c["model"].update(rope_parameters=ROPE | {"partial_rotary_factor": 0.5}),
            ["rope_parameters: partial_rotary_factor: 0.5, expected 1, or leave the key out: only gpt_neox"],
        ),
        (experts(num_experts_per_tok=9), ["num_experts_per_tok: 9, more than the 8 of num_experts"]),
        (experts(num_experts=0), ["num_experts: 0, expected a whole number from 1"]),
        (experts(router_aux_loss_coef=1.5), ["router_aux_loss_coef: 1.5, expected 0 or more and below 1"]),
        (experts(router_aux_loss_coef=-0.1), ["router_aux_loss_coef: -0.1, expected 0 or more and below 1"]),
        (experts(output_router_logits=True), ["output_router_logits: true, expected false", "leave the key"]),
        (experts(mlp_only_layers=[4]), ["mlp_only_layers: 4, expected numbers of layers, from 0 to 3"]),
        (experts(decoder_sparse_step=9), ["leave no layer with experts. Change them, or train a qwen3"]),
        (
            lambda c: (c.update(model={"model_type": "gpt2"}), c["pretrain"].update(block_size=2048)),
            ["pretrain.json: block_size: 2048, more than the 1024 positions", "default of transformers"],
        ),
        (
            lambda c: (
                c["model"].update(model_type="llama"),
                c["model"].pop("max_position_embeddings"),
                c["model"].pop("head_dim"),
                c["generation"].update(max_new_tokens=2048),
            ),
            ["max_new_tokens: 2048 leaves no room for a prompt in the 2048 positions", "default of"],
        ),
        (
            lambda c: (
                c.update(model={"model_type": "gpt2"}),
                c["pretrain"].update(phases=[{"block_size": 2048}], global_batch_size=8),
            ),
            ["phase 1: block_size: 2048, more than the 1024 positions"],
        ),
        (
            gemma(rope_parameters={"full_attention": ROPE | {"rope_type": "linear"}}),
            ["rope_parameters: full_attention: factor: missing"],
        ),
        (
            lambda c: (
                gemma(rope_parameters={"full_attention": ROPE})(c),
                c["pretrain"].update(phases=[{"rope_theta": 5e5}]),
            ),
            ["phase 1: rope_theta: 500000", "the same in all layers", "Leave it out"],
        ),
    ],
)
def test_a_fault_is_named_with_the_way_out(change, words):
    message = refusal(change)
    assert all(word in message for word in words), message


def test_null_means_as_many_key_value_heads_and_equal_thetas_are_no_fault():
    recipe = tiny()
    heads = {"num_attention_heads": 12, "num_key_value_heads": None}
    recipe["model"] = {"model_type": "qwen3", **heads, "rope_theta": 1e4, "rope_parameters": ROPE}
    check_recipe(recipe, "configs/x")
