"""Saves a tokenizer so that transformers 4 and 5 load the same one, and loads it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from recipe.project import RecipeError, read_json, write_json

# What transformers 5 writes about itself and about the folder that the tokenizer came from.
_OF_THE_WRITER = ("backend", "is_local", "local_files_only", "name_or_path")


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and, if it has one, chat_template.jinja.

    transformers 5 names the class ``TokenizersBackend``, which transformers 4 does not know;
    ``PreTrainedTokenizerFast`` is the same class in 5, and the general class in 4. A ``model_max_length``
    without a limit is left out: the model's config.json has the limit.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = {key: value for key, value in read_json(path).items() if key not in _OF_THE_WRITER}
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if values["model_max_length"] == VERY_LARGE_INTEGER:
        del values["model_max_length"]
    write_json(path, values)


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerFast:
    """The tokenizer that `save_tokenizer` wrote, exactly: AutoTokenizer would go by the model next to it.

    See `check_auto_tokenizer`.
    """
    return PreTrainedTokenizerFast.from_pretrained(folder)


def check_auto_tokenizer(tokenizer: PreTrainedTokenizerFast, model_type: str, texts: Sequence[str]) -> None:
    """Raise RecipeError unless AutoTokenizer, in a folder of such a model, gives the same ids for all texts.

    transformers 5.23 does not believe the tokenizer's class in a folder of some types of models, such as
    Qwen2: it keeps the vocabulary and splits the text by the rules of that type.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, Path(folder))
        write_json(Path(folder) / "config.json", {"model_type": model_type})
        auto = AutoTokenizer.from_pretrained(folder)
    for text in texts:
        mine, theirs = (t(text, add_special_tokens=False)["input_ids"] for t in (tokenizer, auto))
        if mine != theirs:
            raise RecipeError(
                f"model_type: {model_type}: in a folder of such a model, transformers loads this tokenizer "
                f"as {type(auto).__name__}, which splits {text[:40]!r} otherwise: {theirs[:8]}, expected "
                f"{mine[:8]}. Use the published tokenizer of a {model_type} (tokenizer.json), or train a "
                "qwen3 or llama"
            )
