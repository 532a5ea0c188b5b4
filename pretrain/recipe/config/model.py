"""The keys of model.json and their checks."""

from __future__ import annotations

from typing import Any, NamedTuple

from recipe.config.initial_model import changed_context, published_config
from recipe.config.keys import check_keys, known_keys, require, show
from recipe.config.ranges import (
    ABOVE_0,
    ABOVE_0_TO_1,
    BELOW_1,
    BETWEEN_0_AND_1,
    FROM_0,
    FROM_1,
    POSITIONS,
    SIZE,
    VOCABULARY,
    Range,
    check_ranges,
    one_of,
    only,
)
from recipe.project import Refused, nearest

# Keys of a model's configuration that the tokenizer decides.
FROM_TOKENIZER = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
# The types of keys for which transformers gives none.
TYPES = {
    "chunk_size_feed_forward": "int",
    "id2label": "dict|null",
    "label2id": "dict|null",
    "is_encoder_decoder": "bool",
    "output_hidden_states": "bool",
    "problem_type": "str|null",
    "return_dict": "bool",
    "rope_parameters": "dict|null",
}
# The names of activation functions in transformers. A test compares them.
ACTIVATIONS = (
    *("gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "gelu_python_tanh"),
    *("gelu_accurate", "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2"),
    *("relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh", "prelu"),
)
_DECODER = "stages 05 to 16 are for decoders that return a dict and predict the next token"


def _decimal(within: Range) -> Range:
    """The range of a key for which transformers takes no whole number."""
    return Range(f"{within.words}, with a decimal point", lambda x: isinstance(x, float) and within.holds(x))


RANGES = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "n_embd", "intermediate_size", "n_inner"), SIZE),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_attention_heads", "n_head"), SIZE),
    **dict.fromkeys(("num_key_value_heads", "head_dim"), SIZE),
    "sliding_window": POSITIONS,
    **dict.fromkeys(("num_experts", "num_experts_per_tok", "moe_intermediate_size"), SIZE),
    "decoder_sparse_step": SIZE,
    "router_aux_loss_coef": _decimal(BELOW_1),
    "output_router_logits": only(False, "training asks for them itself, unless router_aux_loss_coef is 0"),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), POSITIONS),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "max_window_layers"), FROM_0),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), BETWEEN_0_AND_1),
    "initializer_range": BETWEEN_0_AND_1,
    "rope_theta": ABOVE_0,
    **dict.fromkeys(("attention_dropout", "attn_pdrop", "hidden_dropout"), BELOW_1),
    **dict.fromkeys(("embd_pdrop", "resid_pdrop", "classifier_dropout", "summary_first_dropout"), BELOW_1),
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), one_of(*ACTIVATIONS)),
    "query_pre_attn_scalar": FROM_1,
    "final_logit_softcapping": _decimal(ABOVE_0),
    "attn_logit_softcapping": only(None, "transformers 5 does not compute it in Gemma 3, and says nothing"),
    "use_bidirectional_attention": only(False, _DECODER),
    "pretraining_tp": only(1, "transformers no longer reads it"),
    "chunk_size_feed_forward": only(0, "these architectures do not read it"),
    **dict.fromkeys(
        ("is_encoder_decoder", "add_cross_attention", "output_hidden_states"), only(False, _DECODER)
    ),
    "return_dict": only(True, _DECODER),
    "problem_type": only(None, _DECODER),
}
# Where the message of a check may name a value that is not in the file.
DEFAULT_KEY = " (a key that is left out has the default of transformers)"
# The architectures that do not read a rope_theta at the top level.
NO_ROPE_THETA = ("gpt2", "gpt_neox")
# The keys of rope_parameters in a config.json of transformers 4.
OLD_ROPE = ("rope_theta", "rope_scaling", "rope_local_base_freq")
# The kinds of layers, which in Gemma 3 have rotary embeddings of their own: each is a key of rope_parameters.
LAYER_TYPES = ("full_attention", "sliding_attention")
# The keys of rope_parameters, and those that each type of rotary embeddings needs.
ROPE = {
    "rope_type": "str",
    "rope_theta": "float",
    "factor": "float",
    "partial_rotary_factor": "float",  # of gpt_neox; elsewhere 1 alone works
    "original_max_position_embeddings": "int",
    "attention_factor": "float|null",
    "beta_fast": "float|null",
    "beta_slow": "float|null",
    "low_freq_factor": "float",
    "high_freq_factor": "float",
}
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
ROPE_RANGES = {
    "rope_type": one_of(*ROPE_TYPES),
    "factor": FROM_1,
    "partial_rotary_factor": ABOVE_0_TO_1,
    "original_max_position_embeddings": FROM_1,
    **dict.fromkeys(("rope_theta", "attention_factor", "beta_fast", "beta_slow"), ABOVE_0),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor"), ABOVE_0),
}


# transformers 5.23 splits text by rules of their own in folders of these, whatever their tokenizer.json says.
OWN_TOKENIZER = ("qwen2",)


def check_model(values: dict[str, Any], where: str) -> None:
    """Refuse an unknown architecture or key, and a value out of range. where: the file, for the messages.

    `check_shape` checks the values against each other.
    """
    models = known_keys()["model"]
    require(values, ("model_type",), where)
    kind = values["model_type"]
    if not isinstance(kind, str) or kind not in models:
        raise Refused(
            f"{where}: model_type: {show(kind)} is not known.{nearest(str(kind), models)} "
            f"Known: {', '.join(sorted(models))}"
        )
    check_keys(values, models[kind] | {k: v for k, v in TYPES.items() if k in models[kind]}, where)
    check_ranges(values, RANGES, where)
    rope = values.get("rope_parameters")
    _check_rope(kind, rope, f"{where}: rope_parameters")
    theta = values.get("rope_theta")
    if theta is not None and (kind in NO_ROPE_THETA or (rope and rope.get("rope_theta") != theta)):
        instead = "Leave it out" if kind == "gpt2" else "Write it into rope_parameters"
        raise Refused(f"{where}: rope_theta: {show(theta)} would have no effect here. {instead}")
    if values.get("dtype") not in (None, "float32"):
        raise Refused(
            f"{where}: dtype: {show(values['dtype'])}, but weights are kept in float32; bf16 or fp16 in "
            "pretrain.json decides the precision of the computation. Leave it out"
        )


def check_shape(values: dict[str, Any], where: str) -> None:
    """Refuse heads, layers and experts that do not fit each other.

    values: all that is known about the model, with `DEFAULTS`. where: the file, for the messages.
    """
    kind = values.get("model_type")
    hidden, heads = values.get("hidden_size") or values.get("n_embd"), attention_heads(values)
    # Gemma 3 and Llama ask for it even with a head_dim.
    free = values.get("head_dim") and kind not in ("gemma3_text", "llama")
    if hidden and heads and not free and hidden % heads:
        raise Refused(
            f"{where}: hidden size {hidden} does not divide by {heads} attention heads. "
            f"Change one{DEFAULT_KEY}"
        )
    width = values.get("head_dim") or (hidden and heads and hidden // heads)
    if kind != "gpt2" and width and width % 2:
        raise Refused(
            f"{where}: {width} numbers in an attention head, expected an even number: rotary embeddings turn "
            "them in pairs. Change hidden_size, num_attention_heads or head_dim"
        )
    layers, types = values.get("num_hidden_layers"), values.get("layer_types")
    if types is not None and (set(map(str, types)) - set(LAYER_TYPES) or layers not in (None, len(types))):
        raise Refused(
            f"{where}: layer_types: {show(types)}, expected full_attention or sliding_attention for each of "
            "the num_hidden_layers layers"
        )
    _check_experts(values, where)
    groups = values.get("num_key_value_heads")
    if groups and heads and heads % groups:
        raise Refused(
            f"{where}: num_attention_heads: {heads} does not divide by num_key_value_heads {groups}. "
            f"Change one{DEFAULT_KEY}"
        )


def _check_experts(values: dict[str, Any], where: str) -> None:
    """Check the numbers of a mixture of experts against each other. Raises Refused."""
    experts, layers = experts_of(values), values.get("num_hidden_layers")
    if experts is None:
        return
    if experts.of_token > experts.count:
        raise Refused(
            f"{where}: num_experts_per_tok: {experts.of_token}, more than the {experts.count} of "
            "num_experts. Lower it, or raise num_experts"
        )
    dense = values.get("mlp_only_layers") or []
    if bad := [layer for layer in dense if not isinstance(layer, int) or not 0 <= layer < layers]:
        raise Refused(
            f"{where}: mlp_only_layers: {show(bad[0])}, expected numbers of layers, from 0 to {layers - 1}"
        )
    if not experts.layers:
        raise Refused(
            f"{where}: mlp_only_layers and decoder_sparse_step leave no layer with experts. Change them, or "
            "train a qwen3, which has none"
        )


def _check_rope(kind: str, values: dict[str, Any] | None, where: str) -> None:
    """Check the keys of rope_parameters and that its type has the keys that it needs. Raises Refused."""
    if values is None:
        return
    if kind == "gemma3_text":
        if set(values) - set(LAYER_TYPES):
            raise Refused(
                f"{where}: {show(values)}, expected the rotary embeddings of both kinds of layers, each with "
                "a rope_type and rope_theta of its own: full_attention and sliding_attention"
            )
        check_keys(values, dict.fromkeys(LAYER_TYPES, "dict"), where)
        for layers, own in values.items():
            _check_rope("", own, f"{where}: {layers}")
        return
    check_keys(values, ROPE, where)
    check_ranges(values, ROPE_RANGES, where)
    if kind != "gpt_neox":
        whole = only(1, "only gpt_neox turns a part of the numbers of a head")
        check_ranges(values, {"partial_rotary_factor": whole}, where)
    require(values, ("rope_theta", *ROPE_TYPES[values.get("rope_type", "default")]), where)
    low, high = values.get("low_freq_factor"), values.get("high_freq_factor")
    if low is not None and high is not None and low >= high:
        raise Refused(f"{where}: low_freq_factor: {low}, expected less than high_freq_factor, {high}")


def attention_heads(model: dict[str, Any]) -> int | None:
    """The number of query heads in a model.json; architectures have two names for it."""
    return model.get("num_attention_heads") or model.get("n_head")


class Experts(NamedTuple):
    """The experts of a model. layers: those that have experts. of_token: those that a token uses in each."""

    layers: int
    count: int
    of_token: int
    width: int


def experts_of(model: dict[str, Any]) -> Experts | None:
    """The experts of a model; None where it has none.

    model: the values of model.json with `DEFAULTS`, or of a config.json, in which transformers 5 gives their
    number another name.
    """
    count = model.get("num_local_experts") or model.get("num_experts")
    if not count:
        return None
    step, dense = model["decoder_sparse_step"], model.get("mlp_only_layers") or []
    layers = sum(n % step == 0 and n - 1 not in dense for n in range(1, model["num_hidden_layers"] + 1))
    return Experts(layers, count, model["num_experts_per_tok"], model["moe_intermediate_size"])


def sliding_window(model: dict[str, Any]) -> int | None:
    """The positions that a query of some layer sees at most; None if every layer sees all.

    model: the values of model.json with `DEFAULTS`.
    """
    return model.get("sliding_window") if model.get("use_sliding_window", True) else None


def model_values(config: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is known about the model: model.json, and config.json of the checkpoint that it starts from.

    A config.json that was not yet fetched from the hub is left out. Raises Refused.
    """
    model, published = config["model"], published_config(config["pretrain"])
    changed = changed_context(model, published)
    old = {key: value for key, value in published.items() if not (changed and key in OLD_ROPE)}
    return model | old | {key: model[key] for key in changed}


def positions_of(config: dict[str, dict[str, Any]]) -> int | None:
    """The most tokens of a sequence; None as long as config.json of the initial model was not fetched."""
    model = model_values(config)
    if not config["pretrain"].get("initial_model") or published_config(config["pretrain"]):
        model = with_defaults(model)
    return model.get("max_position_embeddings") or model.get("n_positions")


def with_defaults(model: dict[str, Any]) -> dict[str, Any]:
    """The values of model.json, and `DEFAULTS` for the keys that it leaves out."""
    return DEFAULTS.get(model.get("model_type", ""), {}) | model


# The defaults of transformers for keys that model.json leaves out. A test compares them with its classes.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096}
    | {"max_position_embeddings": 131072},
    "llama": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "attention_bias": False, "mlp_bias": False}
    | {"max_position_embeddings": 2048},
    "qwen2": {"hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32, "use_sliding_window": False}
    | {"max_position_embeddings": 32768},
    "qwen3": {"hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "attention_bias": False}
    | {"use_sliding_window": False, "max_position_embeddings": 32768},
    "olmo2": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "attention_bias": False, "max_position_embeddings": 2048},
    "gemma3_text": {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
    | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "attention_bias": False}
    | {"sliding_window": 4096, "tie_word_embeddings": True, "max_position_embeddings": 131072},
    "qwen3_moe": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24}
    | {"num_attention_heads": 32, "num_key_value_heads": 4, "attention_bias": False}
    | {"use_sliding_window": False, "num_experts": 128, "num_experts_per_tok": 8}
    | {"moe_intermediate_size": 768, "decoder_sparse_step": 1, "mlp_only_layers": []}
    | {"max_position_embeddings": 32768},
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
    | {"tie_word_embeddings": True, "attn_pdrop": 0.1},
    "gpt_neox": {"hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44}
    | {"num_attention_heads": 64, "attention_bias": True, "max_position_embeddings": 2048},
}
