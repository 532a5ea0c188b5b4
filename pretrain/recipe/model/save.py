"""Completes the files of a saved model, so that transformers 4 and 5 load the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipe.project import read_json, write_json

# What transformers 5 writes into generation_config.json although it says nothing about generation.
_NOT_OF_GENERATION = ("_from_model_config", "output_attentions", "output_hidden_states", "use_cache")


def complete_configs(folder: Path) -> None:
    """Add to config.json what transformers 4 reads, and take from generation_config.json what nobody reads.

    folder: as ``save_pretrained`` of transformers 5 wrote it.
    """
    config = read_json(folder / "config.json")
    # transformers 4 has its own name for the number of experts, and 128 of them without it.
    experts = {"num_experts": config["num_local_experts"]} if config["model_type"] == "qwen3_moe" else {}
    write_json(folder / "config.json", config | old_rope_keys(config) | experts)
    generation = read_json(folder / "generation_config.json")
    kept = {key: value for key, value in generation.items() if key not in _NOT_OF_GENERATION}
    write_json(folder / "generation_config.json", kept)


def old_rope_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The keys by which transformers 4 knows what transformers 5 writes as ``rope_parameters``.

    config: the content of config.json. Without these keys, transformers 4 computes with its defaults
    (``rope_theta`` 10,000, no scaling) and says nothing. transformers 5 reads the new key, and finds the same
    values in the old ones.
    """
    if "rope_parameters" not in config:
        return {}
    scaling = dict(config["rope_parameters"])
    if "sliding_attention" in scaling:  # Gemma 3: rotary embeddings by the kind of layer
        local = {"rope_local_base_freq": scaling["sliding_attention"]["rope_theta"]}
        return local | old_rope_keys(config | {"rope_parameters": scaling["full_attention"]})
    theta, share = scaling.pop("rope_theta"), scaling.pop("partial_rotary_factor", None)
    neox = config["model_type"] == "gpt_neox"
    keys = {"rotary_emb_base" if neox else "rope_theta": theta}
    if share is not None:
        keys["rotary_pct" if neox else "partial_rotary_factor"] = share
    if scaling["rope_type"] != "default":
        keys["rope_scaling"] = scaling
    return keys
