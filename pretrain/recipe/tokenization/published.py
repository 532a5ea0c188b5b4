"""A published tokenizer, used as it is or extended by tokens that are learnt from Japanese text."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece as spm
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from recipe.config.tokenizer import SPECIAL_TOKENS, round_up, special_tokens
from recipe.project import RecipeError, user_path
from recipe.tokenization.convert import (
    NEVER,
    as_fast,
    from_sentencepiece,
    hide_control_tokens,
    sentencepiece_tokens,
)
from recipe.tokenization.train import train_sentencepiece

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "*.model",
    "vocab.*",
    "merges.txt",
)
_JAPANESE = re.compile("[ぁ-ゟァ-ヿｦ-ﾟ々-〇㐀-䶿一-鿿豈-﫿\U00020000-\U0003ffff]{1,1000}")
_FIRST_MARK = 0x20000  # the character that shows token 0 to the BPE trainer; the next one shows token 1, ...


class Published(NamedTuple):
    """A published tokenizer.

    tokens: its control tokens, ``pad_token`` and so on; ``bos_token`` is what the tokenizer itself puts
    before a text, and is absent when it puts nothing there.
    """

    tokenizer: Tokenizer
    tokens: dict[str, str]


def find_published(name: str, revision: str | None = None, local_files_only: bool = False) -> Path:
    """The folder or SentencePiece file of a published tokenizer: a path, or a name on the hub.

    From the hub it fetches only tokenizer files, and no code. Raises RecipeError when the name is neither a
    path nor available from the hub.
    """
    path = user_path(name)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            name, revision=revision, allow_patterns=list(FILES), local_files_only=local_files_only
        )
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"tokenizer {name!r}: no such folder or file, and not available from the hub "
            f"({_first_line(error)}). Give the path of a folder with tokenizer.json, or of a "
            "SentencePiece file"
        ) from error
    return Path(found)


def load_published(path: Path) -> Published:
    """Read a published tokenizer from a folder or a SentencePiece file.

    It reads tokenizer.json if the folder has one, else a SentencePiece file, else whatever AutoTokenizer
    understands. tokenizer.json is read unchanged: AutoTokenizer would rebuild a ``tokenizer_class`` by other
    rules. For a SentencePiece file, ``do_lower_case`` of tokenizer_config.json is applied, because the file
    itself cannot hold it. Raises RecipeError when there is no tokenizer or it cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    config = _config(folder)
    tokens = {key: _content(config[key]) for key in SPECIAL_TOKENS if config.get(key)}
    model_files = [path] if path.is_file() else sorted(path.glob("*.model"))
    if path.is_dir() and (path / "tokenizer.json").is_file():
        file = path / "tokenizer.json"
        try:
            core = Tokenizer.from_file(str(file))
        except Exception as error:  # the library has no narrower one
            raise RecipeError(
                f"{file}: not a tokenizer ({_first_line(error)}). Get the file again; a few lines that begin "
                "with `version https://git-lfs` are only a pointer to it (git lfs pull)"
            ) from error
    elif model_files:
        return _load_sentencepiece(model_files[0], config, tokens)
    else:
        core = _load_other(folder)
    return Published(core, _with_start(tokens, _first_token(core, path)))


def _load_sentencepiece(file: Path, config: dict[str, Any], tokens: dict[str, str]) -> Published:
    model = file.read_bytes()
    try:
        processor = spm.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise RecipeError(f"{file}: not a SentencePiece model ({error})") from error
    core = from_sentencepiece(model)
    if config.get("do_lower_case"):
        core.normalizer = normalizers.Sequence([normalizers.Lowercase(), core.normalizer])
    tokens = {key: token for key, token in sentencepiece_tokens(processor).items() if token} | tokens
    # SentencePiece puts nothing before a text; the class and add_bos_token of tokenizer_config.json do.
    try:
        start = _first_token(_load_other(file.parent), file) if config else None
    except RecipeError:  # transformers cannot read it
        start = tokens.get("bos_token") if config.get("add_bos_token") else None
    return Published(core, _with_start(tokens, start))


def _with_start(tokens: dict[str, str], start: str | None) -> dict[str, str]:
    """`tokens`, where ``bos_token`` is `start`, or absent."""
    tokens = {key: token for key, token in tokens.items() if key != "bos_token"}
    return tokens | ({"bos_token": start} if start else {})


def _first_token(tokenizer: Tokenizer, path: Path) -> str | None:
    """The control token that `tokenizer` puts before a text. Raises RecipeError when there are several."""
    encoded = tokenizer.encode("a")
    pairs = zip(encoded.tokens, encoded.special_tokens_mask, strict=True)
    first = [token for token, special in itertools.takewhile(lambda pair: pair[1], pairs)]
    if len(first) > 1:
        raise RecipeError(
            f"{path}: puts {' '.join(first)} before a text, expected one token or none. Use another tokenizer"
        )
    return first[0] if first else None


def _load_other(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False).backend_tokenizer
    except Exception as error:  # converters raise any kind: ImportError without a library for words
        raise RecipeError(
            f"{folder}: has neither tokenizer.json nor a SentencePiece file, and transformers cannot read it "
            f"({_first_line(error)}). Give a folder that has one of them"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _config(folder: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json and special_tokens_map.json of a folder. Raises RecipeError."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                found |= json.loads((folder / name).read_text("utf-8"))
            except (ValueError, TypeError) as error:
                raise RecipeError(f"{folder / name}: no JSON object ({error}). Get the file again") from error
    return found


def _content(token: str | dict[str, Any]) -> str:
    return token["content"] if isinstance(token, dict) else token


def take_over(
    published: Published, config: dict[str, Any], sentences: Iterable[str]
) -> tuple[PreTrainedTokenizerFast, list[list[int]]]:
    """The published tokenizer with the control tokens and the new tokens that tokenizer.json asks for.

    config: the content of tokenizer.json. sentences: text to learn ``new_pieces`` from; not read without
    them. Also returns, for each new token in the order of ids, the old ids that it replaces (see `extend`).
    Raises RecipeError when a control token is not in the vocabulary, or when there is no end token.
    """
    tokens = published.tokens | special_tokens(config)
    if not tokens.get("eos_token"):
        raise RecipeError(
            f"{config['published']}: names no end token, but every document must end with one. Set "
            "tokenizer.eos_token to one of its tokens"
        )
    core = hide_control_tokens(published.tokenizer, {token for token in tokens.values() if token})
    old_ids: list[list[int]] = []
    if config.get("new_pieces"):
        size = round_up(core.get_vocab_size() + config["new_pieces"], config.get("round_to", 1))
        core, old_ids = extend(core, sentences, size - core.get_vocab_size())
    return as_fast(core, tokens), old_ids


def extend(tokenizer: Tokenizer, sentences: Iterable[str], count: int) -> tuple[Tokenizer, list[list[int]]]:
    """The tokenizer with `count` new tokens of Japanese text after its vocabulary; no old id changes.

    Also returns, for each new token, the old ids that it replaces: those of the tokens that were merged into
    it (BPE), or those that the old model gives for it (Unigram). The model's new rows start from their rows.

    BPE: training continues from where it ended, with further merges of the tokens of the text.
    Unigram: the new tokens are the likeliest ones of a model trained on the text, with their scores there.
    Raises RecipeError when the text gives fewer than `count`, and for other types of models.
    """
    runs = Counter(run for sentence in sentences for run in _JAPANESE.findall(sentence))
    state = json.loads(tokenizer.to_str())
    model, size, old = state["model"], tokenizer.get_vocab_size(), tokenizer.get_vocab()
    if max(old.values()) >= size:
        raise RecipeError(
            f"new_pieces: the vocabulary has {size} tokens, but the largest id is {max(old.values())}. New "
            "tokens would get ids that are in use. Leave new_pieces out"
        )
    if model["type"] == "BPE" and not model.get("continuing_subword_prefix"):
        old_ids = _extend_bpe(model, tokenizer, runs, count)
    elif model["type"] == "Unigram":
        old_ids = _extend_unigram(state, old, runs, count)
    else:
        raise RecipeError(f"new_pieces: works for BPE and Unigram, not for {model['type']}. Leave it out")
    if len(old_ids) < count:
        raise RecipeError(
            f"new_pieces: the text gives {len(old_ids)} new tokens, expected {count}. Lower "
            "tokenizer.new_pieces or add text"
        )
    return Tokenizer.from_str(json.dumps(state)), old_ids


def _extend_bpe(
    model: dict[str, Any], tokenizer: Tokenizer, runs: Counter[str], count: int
) -> list[list[int]]:
    """Add up to `count` tokens to the JSON of a BPE model; returns the old ids of each."""
    old = tokenizer.get_vocab()
    model["vocab"] |= {token: i for i, token in _added_tokens(old, model)}
    merges = _further_merges(tokenizer, runs, count)
    spelled = {token: [i] for token, i in old.items()}
    for a, b in merges:
        spelled.setdefault(a + b, spelled[a] + spelled[b])
    new = list(spelled)[len(old) :]
    model["vocab"] |= {token: len(old) + i for i, token in enumerate(new)}
    model["merges"] += [list(merge) for merge in merges]
    return [spelled[token] for token in new]


def _extend_unigram(
    state: dict[str, Any], old: dict[str, int], runs: Counter[str], count: int
) -> list[list[int]]:
    """Add up to `count` tokens to the JSON of a Unigram tokenizer; returns the old ids of each."""
    state["model"]["vocab"] += [[token, NEVER] for _, token in _added_tokens(old, state["model"])]
    new = _likeliest_tokens(runs, count, set(old))
    # The new tokens are already normalised: nothing may be changed in them again.
    plain = Tokenizer.from_str(json.dumps(state | {"normalizer": None, "pre_tokenizer": None}))
    encoded = plain.encode_batch([token for token, _ in new], add_special_tokens=False)
    state["model"]["vocab"] += new
    return [encoding.ids for encoding in encoded]


def _added_tokens(old: dict[str, int], model: dict[str, Any]) -> list[tuple[int, str]]:
    """The (id, token) pairs outside the model's vocabulary, by id.

    An added token that is not in the model's vocabulary gets the id after it. New tokens would change that
    id, so that added tokens are put into the vocabulary first.
    """
    return sorted((i, token) for token, i in old.items() if i >= len(model["vocab"]))


def _further_merges(tokenizer: Tokenizer, runs: Counter[str], count: int) -> list[tuple[str, str]]:
    """The merges that come after the tokenizer's own, in order, until they make `count` new tokens.

    The trainer sees each token as one character, so that it starts from the tokens of the tokenizer.
    """
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    words: Counter[str] = Counter()
    counted = iter(runs.items())
    while batch := list(itertools.islice(counted, 10_000)):
        encoded = tokenizer.encode_batch([run for run, _ in batch], add_special_tokens=False)
        for (_, times), encoding in zip(batch, encoded, strict=True):
            tokens = zip(encoding.word_ids, encoding.ids, strict=True)
            for _, word in itertools.groupby(tokens, key=lambda token: token[0]):
                words["".join(chr(_FIRST_MARK + i) for _, i in word)] += times
    alphabet = {mark for word in words for mark in word}
    continued = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + count + count // 4 + 100, min_frequency=2, show_progress=False
    )
    continued.train_from_iterator((word for word, times in words.items() for _ in range(times)), trainer)
    merges, new = [], set()
    for pair in json.loads(continued.to_str())["model"]["merges"]:
        a, b = ("".join(names[ord(mark) - _FIRST_MARK] for mark in part) for part in pair)
        if len(new) == count:
            break
        merges.append((a, b))
        if tokenizer.token_to_id(a + b) is None:
            new.add(a + b)
    return merges


def _likeliest_tokens(runs: Counter[str], count: int, old: set[str]) -> list[list[Any]]:
    """Up to `count` pairs [token, score] of a Unigram model of the text; tokens in `old` are left out."""
    text = (run for run, times in runs.items() for _ in range(times))
    model = train_sentencepiece(text, {"vocab_size": 8000 + count + len(old)}, strict=False)
    processor = spm.SentencePieceProcessor(model_proto=model)
    tokens = [
        (processor.get_score(i), processor.id_to_piece(i))
        for i in range(processor.vocab_size())
        if not (processor.is_control(i) or processor.is_byte(i) or processor.is_unknown(i))
    ]
    return [[token, score] for score, token in sorted(tokens, reverse=True) if token not in old][:count]
