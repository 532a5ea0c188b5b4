"""The keys of tokenizer.json, their checks, and what follows from them before a tokenizer is there."""

from __future__ import annotations

from typing import Any

from recipe.config.keys import check_keys, nearest, require, show
from recipe.project import Refused

SEGMENTERS = ("jumanpp", "mecab", "sudachi")
# The kinds of tokenizers, with the keys that each takes beside TOKENIZER and, where it is trained, TRAINED.
TOKENIZER_KINDS = {
    "unigram": {"character_coverage": "float", "split_digits": "bool"},
    "bpe": {"character_coverage": "float", "split_digits": "bool"},
    "byte-level-bpe": {"min_frequency": "int", "split_digits": "bool"},
    "word-bpe": {
        "min_frequency": "int",
        "limit_alphabet": "int",
        "split_digits": "bool",
        "segmenter": "str|null",
    },
    "published": {"published": "str", "revision": "str", "new_pieces": "int"},
}
TOKENIZER = {
    "kind": "str",
    "pad_token": "str|null",
    "unk_token": "str|null",
    "bos_token": "str|null",
    "eos_token": "str",
    "round_to": "int",
    "training_megabytes": "float",
    "seed": "int",
    "compare": "list",
}
TRAINED = {
    "vocab_size": "int",
    "pad_token_id": "int",
    "unk_token_id": "int",
    "bos_token_id": "int",
    "eos_token_id": "int",
    "user_symbols": "list",
}
# The control tokens of a tokenizer that is trained here; without ids of their own they get 0, 1, ... in this
# order.
SPECIAL_TOKENS = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def check_tokenizer(values: dict[str, Any], where: str) -> None:
    """Check the keys that a kind of tokenizer takes, and its control tokens. Raises Refused."""
    kind = values.get("kind", "unigram")
    if not isinstance(kind, str) or kind not in TOKENIZER_KINDS:
        raise Refused(
            f"{where}: kind: unknown {show(kind)}.{nearest(str(kind), TOKENIZER_KINDS)} "
            f"Known: {', '.join(TOKENIZER_KINDS)}"
        )
    trained = kind != "published"
    check_keys(values, TOKENIZER | TOKENIZER_KINDS[kind] | (TRAINED if trained else {}), where)
    require(values, ("vocab_size",) if trained else ("published",), where)
    for key in ("vocab_size", "round_to", "training_megabytes", "min_frequency", "limit_alphabet"):
        if values.get(key, 1) <= 0:
            raise Refused(f"{where}: {key}: {values[key]}, wanted more than 0")
    if values.get("new_pieces", 0) < 0:
        raise Refused(f"{where}: new_pieces: {values['new_pieces']}, wanted 0 or more")
    if not 0 < values.get("character_coverage", 1.0) <= 1:
        raise Refused(
            f"{where}: character_coverage: {values['character_coverage']}, wanted above 0, at most 1"
        )
    if not trained and "round_to" in values and not values.get("new_pieces"):
        raise Refused(f"{where}: round_to: needs new_pieces: only they can fill the vocabulary up")
    for key in ("user_symbols", "compare"):
        for symbol in values.get(key, []):
            if (
                not isinstance(symbol, str)
                or not symbol
                or (key == "user_symbols" and set(" ▁") & set(symbol))
            ):
                raise Refused(f"{where}: {key}: {show(symbol)}, wanted a string without spaces")
    if values.get("segmenter") not in (None, *SEGMENTERS):
        near = nearest(str(values["segmenter"]), SEGMENTERS)
        raise Refused(
            f"{where}: segmenter: unknown {show(values['segmenter'])}.{near} Known: {', '.join(SEGMENTERS)}"
        )
    _check_special_tokens(values, where)


def _check_special_tokens(values: dict[str, Any], where: str) -> None:
    tokens = special_tokens(values)
    for key, token in tokens.items():
        if token is not None and (len(token) < 2 or set(token) & set(" \t\r\n\u3000▁:$")):
            raise Refused(
                f"{where}: {key}: {show(token)}, wanted two characters or more, without spaces, ▁, : and $"
            )
    if values.get("kind") == "published":
        return
    named = [token for token in tokens.values() if token is not None]
    for token in named:
        if named.count(token) > 1 or token in values.get("user_symbols", []):
            raise Refused(f"{where}: {show(token)} stands there twice: every token needs a name of its own")
    if values.get("kind", "unigram") != "byte-level-bpe" and tokens["unk_token"] is None:
        raise Refused(f"{where}: unk_token: null, but only byte-level-bpe can spell every text without it")
    for key, token in tokens.items():
        if token is None and f"{key}_id" in values:
            raise Refused(f"{where}: {key}_id: {values[f'{key}_id']}, but {key} is null. Remove one of them")
    ids = [special_ids(values)[f"{key}_id"] for key, token in tokens.items() if token is not None]
    if sorted(ids) != list(range(len(ids))):
        raise Refused(
            f"{where}: the ids of {', '.join(named)} are {ids}; wanted {list(range(len(ids)))} in any order. "
            "Give all of pad_token_id, unk_token_id, bos_token_id, eos_token_id or none"
        )


def special_tokens(tokenizer: dict[str, Any]) -> dict[str, str | None]:
    """The control tokens by tokenizer.json: ``pad_token`` and so on; None for one that shall not be there.

    For the kind ``published`` only what the file names: the rest is as it was published.
    """
    default = {} if tokenizer.get("kind") == "published" else SPECIAL_TOKENS
    return {
        key: tokenizer.get(key, default.get(key)) for key in SPECIAL_TOKENS if key in tokenizer or default
    }


def special_ids(tokenizer: dict[str, Any]) -> dict[str, int | None]:
    """The ids that a trained tokenizer's control tokens will have: ``pad_token_id`` and so on, or None.

    Padding falls to the end token where there is no padding token. Empty for the kind ``published``: its ids
    are known when it is loaded.
    """
    if tokenizer.get("kind") == "published":
        return {}
    tokens = [key for key, token in special_tokens(tokenizer).items() if token is not None]
    ids = {f"{key}_id": tokenizer.get(f"{key}_id", place) for place, key in enumerate(tokens)}
    missing = {f"{key}_id": None for key in SPECIAL_TOKENS if key not in tokens}
    return missing | {"pad_token_id": ids["eos_token_id"]} | ids


def vocabulary_size(tokenizer: dict[str, Any]) -> int | None:
    """The size that a trained tokenizer will have: vocab_size, rounded up to a multiple of round_to.

    None for the kind ``published``.
    """
    if tokenizer.get("kind") == "published":
        return None
    return round_up(tokenizer["vocab_size"], tokenizer.get("round_to", 1))


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `size`."""
    return -(-size // multiple) * multiple
