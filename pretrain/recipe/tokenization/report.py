"""What a tokenizer does to text: the check that nothing is lost, compression, vocabulary, and the report."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import sentencepiece as spm
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from recipe.project import RecipeError, markdown_table
from recipe.tokenization.encode_text import BYTE_TOKEN, encode_text, encode_texts

# What a conversion gets wrong first: rare kanji, joined emoji, half-width kana, every kind of white space,
# the names of control tokens, the empty text.
HARD_CASES = (
    "明治天皇は大嘗宮を主宰した。",
    "𠮷野家で𩸽を食べる。",
    "👨‍👩‍👧‍👦と🏳️‍🌈",
    "ﾊﾝｶｸ ｶﾅ",
    "全角　空白",
    "  二つ  の  空白  ",
    "- 親\n  - 子\n\n    for i in range(n):\n\t\tprint(i)    # 表示\n\n\n",
    "タブ\tと\n改行\r\nと\x01制御\x00文字\x7f\x85\u2028",
    "",
    " ",
    "\n",
    "e\u0301 が\u3099",
    "10〜20時",
    "\ufeff先頭\u200bと\ufffd",
    "<0xE5>と<s>と</s>と<unk>と<pad>という文字列",
    "下線▁の▁▁文字",
    "ABC" * 300,
)
LONG_LINE = 1_000_000  # bytes of the long line that is made from the texts
COMPARISON = (
    "abstract: This is an example of text. introduction: This is an introduction. conclusion: This is a "
    "conclusion.",
    "明治天皇は大嘗宮を主宰した。",
)
_MOST_LINES = 20_000


# -------------------------------------------------------------------------------------------------- checks


def check_lossless(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], processor: spm.SentencePieceProcessor | None = None
) -> dict[str, int]:
    """Check that `texts`, HARD_CASES and a line of a megabyte come back exactly from their ids.

    With `processor`, SentencePiece must also give the same ids. SentencePiece reads U+2581 as a space, so
    that a text with U+2581 comes back with spaces; such texts are counted apart. Returns the counts
    ``texts``, ``lossless``, ``with_u2581`` and, with `processor`, ``identical_ids``. Raises RecipeError with
    the first text that differs.
    """
    long_line = "".join(texts).replace("\n", "").encode("utf-8")[:LONG_LINE].decode("utf-8", errors="ignore")
    cases = [*HARD_CASES, *texts, long_line]
    report = {"texts": len(cases), "lossless": 0, "with_u2581": 0}
    for case, ids in zip(cases, encode_texts(tokenizer, cases), strict=True):
        expected = case
        if processor:
            theirs = processor.encode(case)
            if ids != theirs:
                raise RecipeError(
                    "SentencePiece and the fast tokenizer disagree on "
                    f"{_around(case, ids, theirs)}. Another tokenizer.seed or vocab_size may avoid it"
                )
            report["identical_ids"] = report.get("identical_ids", 0) + 1
            expected = case.replace("▁", " ")
        back = tokenizer.decode(ids)
        if back != expected:
            shown = slice(
                max(0, first_difference(back, expected) - 20), first_difference(back, expected) + 60
            )
            raise RecipeError(
                f"round trip: {expected[shown]!r} comes back as {back[shown]!r}. The tokenizer loses text: "
                "choose another tokenizer.kind, or report it"
            )
        report["lossless" if back == case else "with_u2581"] += 1
    return report


def first_difference(one: Any, other: Any) -> int:
    """The index of the first element that differs between two sequences; else the length of the shorter."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _around(case: str, ids: list[int], others: list[int]) -> str:
    index = first_difference(ids, others)
    shown = slice(max(0, index - 3), index + 12)
    return f"{case[:80]!r}, token {index}: {others[shown]} and {ids[shown]}"


def measure_lost_text(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> dict[str, Any]:
    """How much text a tokenizer loses: the share of lines that come back exactly, and of unknown tokens.

    ``changed`` shows up to five lines that do not come back.
    """
    lines = [line for text in texts for line in text.split("\n") if line][:_MOST_LINES]
    ids = encode_texts(tokenizer, lines)
    back = tokenizer.batch_decode(ids)
    changed = [(line, got) for line, got in zip(lines, back, strict=True) if line != got]
    tokens = sum(map(len, ids))
    unknown = 0 if tokenizer.unk_token_id is None else sum(row.count(tokenizer.unk_token_id) for row in ids)
    return {
        "lines": len(lines),
        "exact_lines": 1 - len(changed) / max(1, len(lines)),
        "unknown_rate": unknown / max(1, tokens),
        "changed": [{"line": line[:100], "comes_back": got[:100]} for line, got in changed[:5]],
    }


# --------------------------------------------------------------------------------------------- measurements


def compression(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> dict[str, float]:
    """Bytes and characters per token, without control tokens.

    Also the share of unknown tokens, and of tokens that hold a part of a character (``byte_fallback_rate``).
    """
    ids = encode_texts(tokenizer, texts)
    tokens = sum(map(len, ids))
    counts = Counter(i for row in ids for i in row)
    parts = sum(counts[i] for i in byte_tokens(tokenizer))
    return {
        "tokens": tokens,
        "bytes_per_token": sum(len(text.encode("utf-8")) for text in texts) / max(1, tokens),
        "characters_per_token": sum(map(len, texts)) / max(1, tokens),
        "byte_fallback_rate": parts / max(1, tokens),
        "unknown_rate": counts[tokenizer.unk_token_id] / max(1, tokens) if tokenizer.unk_token else 0.0,
    }


def byte_tokens(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """The ids of tokens whose bytes are not whole characters."""
    return {i for i, token in spelling(tokenizer).items() if isinstance(token, bytes)}


def spelling(tokenizer: PreTrainedTokenizerFast) -> dict[int, str | bytes]:
    """What each id spells: text, or bytes when they are not whole characters."""
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
    alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
    alphabet = alphabet if '"ByteLevel"' in json.dumps(decoder) else {}
    found: dict[int, str | bytes] = {}
    for token, i in tokenizer.get_vocab().items():
        byte = BYTE_TOKEN.fullmatch(token)
        if byte:
            raw = bytes([int(byte[1], 16)])
        elif alphabet and all(character in alphabet for character in token):
            raw = bytes(alphabet[character] for character in token)
        else:
            raw = token.replace("▁", " ").encode("utf-8")
        try:
            found[i] = raw.decode("utf-8")
        except UnicodeDecodeError:
            found[i] = raw
    return found


SCRIPTS = (
    "hiragana",
    "katakana",
    "kanji",
    "mixed Japanese",
    "Latin",
    "digits",
    "symbols",
    "other",
    "bytes",
    "control",
)


def script(token: str | bytes) -> str:
    """The script of a token: one of SCRIPTS, but never ``control``. Spaces in it do not count."""
    if isinstance(token, bytes):
        return "bytes"
    kinds = {_character_script(character) for character in token if not character.isspace()} or {"symbols"}
    if len(kinds) == 1:
        return kinds.pop()
    return "mixed Japanese" if kinds <= {"hiragana", "katakana", "kanji"} else "other"


def _character_script(character: str) -> str:
    # The Unicode names of these do not tell the script.
    if character in "ー々〆〇":
        return "katakana" if character == "ー" else "kanji"
    name = unicodedata.name(character, "")
    for word, kind in (
        ("HIRAGANA", "hiragana"),
        ("KATAKANA", "katakana"),
        ("CJK", "kanji"),
        ("LATIN", "Latin"),
    ):
        if word in name and character.isalpha():
            return kind
    if character.isdigit():
        return "digits"
    return "other" if character.isalpha() else "symbols"


def describe_vocabulary(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Size, number of tokens by script, and the 20 longest tokens."""
    spelt, control = spelling(tokenizer), set(tokenizer.all_special_ids)
    counts = Counter("control" if i in control else script(token) for i, token in spelt.items())
    words = [token for i, token in spelt.items() if isinstance(token, str) and i not in control]
    return {
        "size": len(tokenizer),
        "scripts": {name: counts[name] for name in SCRIPTS},
        "longest": sorted(words, key=lambda word: (-len(word), word))[:20],
    }


def readable_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    """The tokens of a text in readable form; bytes that are not whole characters as ``<E5>``."""
    spelt = spelling(tokenizer)
    return [
        token if isinstance(token, str) else "".join(f"<{byte:02X}>" for byte in token)
        for token in (spelt[i] for i in encode_text(tokenizer, text))
    ]


# ------------------------------------------------------------------------------------------------- report


def describe(tokenizers: dict[str, PreTrainedTokenizerFast], texts: dict[str, list[str]]) -> dict[str, Any]:
    """Compression by source, vocabulary and tokens of COMPARISON, by the name of the tokenizer.

    texts: held-out texts by source.
    """
    return {
        name: {
            "sources": {source: compression(tokenizer, part) for source, part in texts.items() if part},
            "vocabulary": describe_vocabulary(tokenizer),
            "sentences": [readable_tokens(tokenizer, sentence) for sentence in COMPARISON],
        }
        for name, tokenizer in tokenizers.items()
    }


def report_tables(
    tokenizers: dict[str, dict[str, Any]], check: dict[str, Any], missing: dict[str, str]
) -> str:
    """The report in Markdown.

    tokenizers: from `describe`. check: from `check_lossless` or `measure_lost_text`. missing: by the name of
    a tokenizer that could not be compared, the reason.
    """
    parts = [
        ["# Tokenizer", "", *_check_table(check)],
        ["## Held-out text", "", *_compression_table(tokenizers)],
        ["## Vocabulary", "", *_vocabulary_table(tokenizers)],
    ]
    for name, figures in tokenizers.items():
        longest = " ".join(f"`{_visible(token)}`" for token in figures["vocabulary"]["longest"])
        parts.append([f"Longest tokens of {name}: {longest}"])
    parts.append(["## The same sentences"])
    for position, sentence in enumerate(COMPARISON):
        lines = [sentence, ""]
        for name, figures in tokenizers.items():
            tokens = figures["sentences"][position]
            lines.append(f"- {name}, {len(tokens)} tokens: `{'|'.join(map(_visible, tokens))}`")
        parts.append(lines)
    if missing:
        parts.append(["## Not compared", "", *(f"- {name}: {reason}" for name, reason in missing.items())])
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _check_table(check: dict[str, Any]) -> list[str]:
    rows = {key.replace("_", " "): value for key, value in check.items() if key != "changed"}
    shown = [(key, f"{value:,}" if isinstance(value, int) else f"{value:.4%}") for key, value in rows.items()]
    return markdown_table(("check", ""), shown)


def _compression_table(tokenizers: dict[str, dict[str, Any]]) -> list[str]:
    rows = []
    for name, figures in tokenizers.items():
        for source, row in figures["sources"].items():
            sizes = [f"{row[key]:.3f}" for key in ("bytes_per_token", "characters_per_token")]
            rates = [f"{row[key]:.3%}" for key in ("byte_fallback_rate", "unknown_rate")]
            rows.append([name, source, *sizes, *rates])
    heads = ("tokenizer", "source", "bytes/token", "characters/token", "parts of a character", "unknown")
    return markdown_table(heads, rows, "llr")


def _vocabulary_table(tokenizers: dict[str, dict[str, Any]]) -> list[str]:
    found = {name: figures["vocabulary"] for name, figures in tokenizers.items()}
    rows = [
        [name, *(f"{count:,}" for count in (known["size"], *(known["scripts"][kind] for kind in SCRIPTS)))]
        for name, known in found.items()
    ]
    return markdown_table(("tokenizer", "size", *SCRIPTS), rows)


def _visible(token: str) -> str:
    """A token on one line of Markdown."""
    return token.replace("\n", "␊").replace("\t", "␉").replace("`", "ˋ").replace("|", "¦")


def draw_report(tokenizers: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw bytes per token by source, and each script's share of the vocabulary, all tokenizers together.

    tokenizers: from `describe`. path: the PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    width = 0.8 / len(tokenizers)
    for position, (name, figures) in enumerate(tokenizers.items()):
        rows = {source: row["bytes_per_token"] for source, row in figures["sources"].items()}
        vocabulary_size = figures["vocabulary"]["size"]
        shares = {kind: count / vocabulary_size for kind, count in figures["vocabulary"]["scripts"].items()}
        for axis, bars in zip(axes, (rows, shares), strict=True):
            axis.bar([i + position * width for i in range(len(bars))], bars.values(), width, label=name)
            axis.set_xticks([i + 0.4 - width / 2 for i in range(len(bars))], bars, rotation=30, ha="right")
            axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("bytes per token, held-out text")
    axes[1].set_ylabel("share of the vocabulary")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=110)
