"""The keys of generation.json and their checks."""

from __future__ import annotations

from typing import Any

from recipe.config.keys import check_keys, known_keys, require, show
from recipe.config.ranges import (
    ABOVE_0,
    ABOVE_0_TO_1,
    ABOVE_0_TO_100,
    BELOW_1,
    FROM_0,
    FROM_0_TO_1,
    SEED,
    TEXTS,
    Range,
    check_ranges,
    whole,
)
from recipe.project import Refused

GENERATION = {"prompts": "list", "questions": "list", "seed": "int"}
# The keys of GenerationConfig that work in stages 07, 14 and 15, in chat.py and in samples.
NATIVE = {
    "do_sample": "bool",
    "temperature": "float|null",
    "top_p": "float|null",
    "top_k": "int|null",
    "min_p": "float|null",
    "top_h": "float|null",
    "typical_p": "float|null",
    "epsilon_cutoff": "float|null",
    "eta_cutoff": "float|null",
    "repetition_penalty": "float|null",
    "no_repeat_ngram_size": "int|null",
    "max_new_tokens": "int",
    "min_new_tokens": "int|null",
    "num_beams": "int|null",
    "num_return_sequences": "int",
    "length_penalty": "float|null",
    "early_stopping": "bool|null",
    "renormalize_logits": "bool|null",
    "remove_invalid_values": "bool|null",
    "stop_strings": "list|null",
    "max_time": "float|null",
    "use_cache": "bool",
    "pad_token_id": "int|null",
    "bos_token_id": "int|null",
    "eos_token_id": "int|null",
    "transformers_version": "str",
}
RANGES = {
    "temperature": Range(
        "more than 0 (for the most probable token at every step, set do_sample to false), at most 100",
        lambda x: 0 < x <= 100,
    ),
    "top_p": FROM_0_TO_1,
    "top_k": FROM_0,
    "min_p": FROM_0_TO_1,
    "top_h": ABOVE_0_TO_1,
    "typical_p": ABOVE_0_TO_1,
    "epsilon_cutoff": BELOW_1,
    "eta_cutoff": BELOW_1,
    "repetition_penalty": ABOVE_0_TO_100,
    "no_repeat_ngram_size": whole(0, 10**8),
    "max_new_tokens": whole(1, 10**8),
    "min_new_tokens": FROM_0,
    **dict.fromkeys(("num_beams", "num_return_sequences"), whole(1, 1024)),
    "stop_strings": TEXTS,
    "max_time": ABOVE_0,
    "seed": SEED,
}


def check_generation(values: dict[str, Any], where: str) -> None:
    """Check prompts, questions and the keys of a GenerationConfig. Raises Refused at the first error."""
    for key in values:
        if key in known_keys()["generation"] and key not in NATIVE:
            raise Refused(f"{where}: {key}: stages 07 and 15 and chat.py do not support it. Leave it out")
    check_keys(values, NATIVE | GENERATION, where)
    require(values, ("prompts", "max_new_tokens"), where)
    check_ranges(values, RANGES, where)
    least, most = values.get("min_new_tokens") or 0, values["max_new_tokens"]
    if least > most:
        raise Refused(f"{where}: min_new_tokens: {least}, expected at most max_new_tokens, {most}")
    if not values["prompts"]:
        raise Refused(f"{where}: prompts: empty, expected one or more texts to continue")
    for key in ("prompts", "questions"):
        for text in values.get(key, []):
            if not isinstance(text, str) or not text.strip():
                raise Refused(f"{where}: {key}: {show(text)}, expected strings that are not empty")
