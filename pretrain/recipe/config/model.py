"""The keys of model.json and their checks."""

from __future__ import annotations

from typing import Any

from recipe.config.initial_model import published_config
from recipe.config.keys import check_keys, known_keys, nearest, require, show
from recipe.project import Refused

# Keys of a model's configuration that the tokenizer decides.
FROM_TOKENIZER = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")


def check_model(values: dict[str, Any], where: str) -> None:
    """Refuse an unknown architecture or key, a value out of range, and heads that do not divide.

    where: the file, for the messages.
    """
    models = known_keys()["model"]
    require(values, ("model_type",), where)
    kind = values["model_type"]
    if kind not in models:
        raise Refused(
            f"{where}: model_type: {show(kind)} is not known.{nearest(str(kind), models)} "
            f"Known: {', '.join(sorted(models))}"
        )
    check_keys(values, models[kind], where)
    if values.get("dtype") not in (None, "float32"):
        raise Refused(
            f"{where}: dtype: {show(values['dtype'])}, but weights are kept in float32; bf16 or fp16 in "
            "pretrain.json decides the precision of the computation. Leave it out"
        )
    for key in ("num_hidden_layers", "n_layer", "hidden_size", "n_embd", "num_attention_heads", "n_head"):
        if key in values and values[key] < 1:
            raise Refused(f"{where}: {key}: {show(values[key])}, expected 1 or more")
    hidden, heads = values.get("hidden_size") or values.get("n_embd"), attention_heads(values)
    if hidden and heads and "head_dim" not in values and hidden % heads:
        raise Refused(f"{where}: hidden size {hidden} does not divide by {heads} attention heads. Change one")
    groups = values.get("num_key_value_heads")
    if groups and heads and heads % groups:
        raise Refused(
            f"{where}: num_attention_heads: {heads} does not divide by num_key_value_heads {groups}. "
            "Change one"
        )


def attention_heads(model: dict[str, Any]) -> int | None:
    """The number of query heads in a model.json; architectures have two names for it."""
    return model.get("num_attention_heads") or model.get("n_head")


def model_values(config: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is known about the model: model.json, and config.json of the checkpoint that it starts from.

    A config.json that was not yet fetched from the hub is left out. Raises Refused.
    """
    return config["model"] | published_config(config["pretrain"])


# The defaults of transformers for keys that model.json leaves out. A test compares them with its classes.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096},
    "llama": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "attention_bias": False, "mlp_bias": False},
    "qwen3": {"hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "attention_bias": False},
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
    | {"tie_word_embeddings": True, "attn_pdrop": 0.1},
    "gpt_neox": {"hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44}
    | {"num_attention_heads": 64, "attention_bias": True},
}
