"""The keys of generation.json and their checks."""

from __future__ import annotations

from typing import Any

from recipe.config.keys import check_keys, known_keys, require, show
from recipe.project import Refused

GENERATION = {"prompts": "list", "questions": "list", "seed": "int"}


def check_generation(values: dict[str, Any], where: str) -> None:
    """Check prompts, questions and the keys of a GenerationConfig. Raises Refused at the first error."""
    check_keys(values, known_keys()["generation"] | GENERATION, where)
    require(values, ("prompts", "max_new_tokens"), where)
    if not values["prompts"]:
        raise Refused(f"{where}: prompts: empty, expected one or more texts to continue")
    for key in ("prompts", "questions"):
        for text in values.get(key, []):
            if not isinstance(text, str):
                raise Refused(f"{where}: {key}: {show(text)}, expected strings")
