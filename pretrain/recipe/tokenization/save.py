"""Saves a tokenizer so that transformers 4 and 5 load the same one."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from recipe.project import read_json, write_json

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
