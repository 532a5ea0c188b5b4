"""The keys of model.json and their checks."""

from __future__ import annotations

from typing import Any

from recipe.config.initial_model import published_config
from recipe.config.keys import check_keys, known_keys, nearest, require, show
from recipe.project import Refused

FROM_TOKENIZER = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")  # of a model's facts


def check_model(values: dict[str, Any], where: str) -> None:
    """Refuse an unknown architecture or key, and heads that do not divide."""
    models = known_keys()["model"]
    require(values, ("model_type",), where)
    kind = values["model_type"]
    if kind not in models:
        raise Refused(
            f"{where}: model_type: unknown {show(kind)}.{nearest(str(kind), models)} "
            f"Known: {', '.join(sorted(models))}"
        )
    check_keys(values, models[kind], where)
    if values.get("dtype") not in (None, "float32"):
        raise Refused(
            f"{where}: dtype: {show(values['dtype'])}, but weights are kept in float32, and bf16 or fp16 "
            "in pretrain.json decides what is computed with. Leave it out"
        )
    for key in ("num_hidden_layers", "n_layer", "hidden_size", "n_embd", "num_attention_heads", "n_head"):
        if key in values and values[key] < 1:
            raise Refused(f"{where}: {key}: {show(values[key])}, wanted 1 or more")
    hidden, heads = values.get("hidden_size") or values.get("n_embd"), attention_heads(values)
    if hidden and heads and "head_dim" not in values and hidden % heads:
        raise Refused(f"{where}: hidden size {hidden} does not divide by {heads} attention heads")
    groups = values.get("num_key_value_heads")
    if groups and heads and heads % groups:
        raise Refused(f"{where}: num_attention_heads {heads} does not divide by num_key_value_heads {groups}")


def attention_heads(model: dict[str, Any]) -> int | None:
    """The query heads of a model.json, whose name differs between architectures."""
    return model.get("num_attention_heads") or model.get("n_head")


def model_values(config: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is known of the model: model.json, and config.json of the checkpoint that it starts from.

    The latter is missing as long as it has to be fetched from the hub. Raises Refused.
    """
    return config["model"] | published_config(config["pretrain"])


# What transformers takes where model.json says nothing (its config classes; a test compares).
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
