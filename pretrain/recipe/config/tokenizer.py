"""The keys of tokenizer.json: the kinds of tokenizers, the checks, and what is known before stage 03 runs."""

from __future__ import annotations

from typing import Any, NamedTuple

from recipe.config.keys import check_keys, require, show
from recipe.config.ranges import ABOVE_0, SEED, VOCABULARY, Range, check_ranges, whole
from recipe.project import Refused, nearest


class TokenizerKind(NamedTuple):
    """What the checks and stage 03 need to know about a kind of tokenizer.

    keys: its own keys of tokenizer.json with their JSON types, in addition to KEYS and TRAINED_KEYS.
    memory: resident bytes that training needs per byte of the sample, measured by tests/bench/tokenizer.py.
    trained: False for a tokenizer that is taken over; its size and its ids are known when it is loaded.
    lossless: stage 03 stops unless every text comes back exactly; otherwise it reports what is lost.
    needs_unknown: False when the kind can spell every text, so that ``unk_token`` may be null.
    """

    keys: dict[str, str]
    memory: int
    trained: bool = True
    lossless: bool = True
    needs_unknown: bool = True

    @property
    def sentencepiece(self) -> bool:
        """Whether SentencePiece trains it."""
        return "character_coverage" in self.keys


# A new kind is an entry here and a function in TRAINERS of recipe/tokenization/train.py.
TOKENIZER_KINDS = {
    "unigram": TokenizerKind({"character_coverage": "float", "split_digits": "bool"}, memory=30),
    "bpe": TokenizerKind({"character_coverage": "float", "split_digits": "bool"}, memory=15),
    "byte-level-bpe": TokenizerKind(
        {"min_frequency": "int", "split_digits": "bool"}, memory=30, needs_unknown=False
    ),
    "word-bpe": TokenizerKind(
        {
            "min_frequency": "int",
            "limit_alphabet": "int",
            "split_digits": "bool",
            "segmenter": "str|null",
        },
        memory=30,
        lossless=False,
    ),
    "published": TokenizerKind(
        {"published": "str", "revision": "str", "new_pieces": "int"},
        memory=30,
        trained=False,
        lossless=False,
    ),
}
KEYS = {
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
TRAINED_KEYS = {
    "vocab_size": "int",
    "pad_token_id": "int",
    "unk_token_id": "int",
    "bos_token_id": "int",
    "eos_token_id": "int",
    "user_symbols": "list",
}
RANGES = {
    "vocab_size": VOCABULARY,
    "round_to": VOCABULARY,
    "training_megabytes": ABOVE_0,
    "min_frequency": ABOVE_0,
    "limit_alphabet": ABOVE_0,
    "new_pieces": whole(0, 10**7),
    "seed": SEED,
    # The range of SentencePiece.
    "character_coverage": Range("a number from 0.98 to 1", lambda x: 0.98 <= x <= 1),
}
# The control tokens of a trained tokenizer. When no ids are given, they get 0, 1, ... in this order.
SPECIAL_TOKENS = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
SEGMENTERS = ("jumanpp", "mecab", "sudachi")


def kind_of(tokenizer: dict[str, Any]) -> TokenizerKind:
    """The entry of TOKENIZER_KINDS that tokenizer.json names; ``unigram`` when it names none."""
    return TOKENIZER_KINDS[tokenizer.get("kind", "unigram")]


def required_characters(values: dict[str, Any]) -> set[str]:
    """The characters that get a token of a SentencePiece model even when the text lacks them.

    A space (as ▁), which would come back as U+2581 if it was spelled in bytes, and the characters of control
    and byte tokens. values: of tokenizer.json.
    """
    return {*"▁<0x123456789ABCDEF>", *"".join(filter(None, special_tokens(values).values()))}


def check_tokenizer(values: dict[str, Any], where: str) -> None:
    """Check the keys of tokenizer.json, their values and the control tokens.

    where: the file, for the messages. Raises Refused.
    """
    name = values.get("kind", "unigram")
    if not isinstance(name, str) or name not in TOKENIZER_KINDS:
        raise Refused(
            f"{where}: kind: unknown {show(name)}.{nearest(str(name), TOKENIZER_KINDS)} "
            f"Known: {', '.join(TOKENIZER_KINDS)}"
        )
    kind = kind_of(values)
    check_keys(values, KEYS | kind.keys | (TRAINED_KEYS if kind.trained else {}), where)
    require(values, ("vocab_size",) if kind.trained else ("published",), where)
    check_ranges(values, RANGES, where)
    if not kind.trained and "round_to" in values and not values.get("new_pieces"):
        raise Refused(f"{where}: round_to: needs new_pieces, because only they can enlarge the vocabulary")
    for key in ("user_symbols", "compare"):
        for symbol in values.get(key, []):
            spaces = key == "user_symbols" and isinstance(symbol, str) and set(" ▁") & set(symbol)
            if not isinstance(symbol, str) or not symbol or spaces:
                raise Refused(f"{where}: {key}: {show(symbol)}, expected a string without spaces")
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
                f"{where}: {key}: {show(token)}, expected two characters or more, without spaces, ▁, : and $"
            )
    kind = kind_of(values)
    if not kind.trained:
        return
    names, symbols = [token for token in tokens.values() if token is not None], values.get("user_symbols", [])
    for token in names + symbols:
        if (names + symbols).count(token) > 1:
            raise Refused(f"{where}: {show(token)} occurs twice. Give every token its own name")
    if kind.sentencepiece and (twice := sorted(required_characters(values) & set(symbols))):
        raise Refused(
            f"{where}: user_symbols: {show(twice[0])} is a token of every vocabulary of this kind. Remove it"
        )
    # Every kind but word-bpe spells what it does not know in the 256 bytes.
    least = len(names) + len(symbols) + (256 if kind.lossless else 1)
    if values["vocab_size"] < least:
        raise Refused(
            f"{where}: vocab_size: {values['vocab_size']}, expected at least {least}: control tokens, user "
            "symbols and bytes need that many"
        )
    if kind.needs_unknown and tokens["unk_token"] is None:
        able = ", ".join(name for name, kind in TOKENIZER_KINDS.items() if not kind.needs_unknown)
        raise Refused(f"{where}: unk_token: null, but only {able} can spell every text without it")
    for key, token in tokens.items():
        if token is None and f"{key}_id" in values:
            raise Refused(f"{where}: {key}_id: {values[f'{key}_id']}, but {key} is null. Remove one of them")
    ids = [special_ids(values)[f"{key}_id"] for key, token in tokens.items() if token is not None]
    if sorted(ids) != list(range(len(ids))):
        raise Refused(
            f"{where}: the ids of {', '.join(names)} are {ids}, expected {list(range(len(ids)))} in any "
            "order. Give all of pad_token_id, unk_token_id, bos_token_id, eos_token_id, or none of them"
        )


def special_tokens(tokenizer: dict[str, Any]) -> dict[str, str | None]:
    """The control tokens by tokenizer.json, from ``pad_token`` to ``eos_token``; None for an absent one.

    For a tokenizer that is taken over, only those that the file names: the others are as published.
    """
    default = SPECIAL_TOKENS if kind_of(tokenizer).trained else {}
    return {
        key: tokenizer.get(key, default.get(key)) for key in SPECIAL_TOKENS if key in tokenizer or default
    }


def special_ids(tokenizer: dict[str, Any]) -> dict[str, int | None]:
    """The ids that the control tokens of a trained tokenizer will have: ``pad_token_id`` and so on, or None.

    Without a padding token, the end token is used for padding. Empty for a tokenizer that is taken over.
    """
    if not kind_of(tokenizer).trained:
        return {}
    tokens = [key for key, token in special_tokens(tokenizer).items() if token is not None]
    ids = {f"{key}_id": tokenizer.get(f"{key}_id", position) for position, key in enumerate(tokens)}
    missing = {f"{key}_id": None for key in SPECIAL_TOKENS if key not in tokens}
    return missing | {"pad_token_id": ids["eos_token_id"]} | ids


def vocabulary_size(tokenizer: dict[str, Any]) -> int | None:
    """The size that a trained tokenizer will have: vocab_size, rounded up to a multiple of round_to.

    None for a tokenizer that is taken over.
    """
    if not kind_of(tokenizer).trained:
        return None
    return round_up(tokenizer["vocab_size"], tokenizer.get("round_to", 1))


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `size`."""
    return -(-size // multiple) * multiple
