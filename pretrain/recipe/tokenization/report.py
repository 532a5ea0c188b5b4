"""What a tokenizer does to text: the gate it has to pass, its compression, its vocabulary, the report."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import sentencepiece as spm
from transformers import PreTrainedTokenizerFast

from recipe.project import RecipeError
from recipe.tokenization.encode_text import BYTE_TOKEN, encode_text, encode_texts

# What a conversion gets wrong first: rare kanji, joined emoji, half-width kana, white space of every kind,
# names of control tokens, nothing.
HARD_CASES = (
    "明治天皇は大嘗宮を主宰した。",
    "𠮷野家で𩸽を食べる。",
    "👨‍👩‍👧‍👦と🏳️‍🌈",
    "ﾊﾝｶｸ ｶﾅ",
    "全角　空白",
    "  二つ  の  空白  ",
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
LONG_LINE = 1_000_000  # bytes of the line that is made of the texts
COMPARISON = (
    "abstract: This is an example of text. introduction: This is an introduction. conclusion: This is a "
    "conclusion.",
    "明治天皇は大嘗宮を主宰した。",
)
_MOST_LINES = 20_000


def gate(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], processor: spm.SentencePieceProcessor | None = None
) -> dict[str, int]:
    """Prove a trained tokenizer on `texts`, the hard cases and a line of a megabyte; figures of the proof.

    Every text must come back from its ids exactly, and with `processor` have the ids that SentencePiece gives
    it. One rule is stated: with SentencePiece U+2581 reads as a space, so a text that holds it comes back
    with spaces; such texts are counted. Raises RecipeError with the first text that differs.
    """
    long_line = "".join(texts).replace("\n", "").encode("utf-8")[:LONG_LINE].decode("utf-8", errors="ignore")
    cases = [*HARD_CASES, *texts, long_line]
    report = {"texts": len(cases), "lossless": 0, "with_u2581": 0}
    for case, ids in zip(cases, encode_texts(tokenizer, cases), strict=True):
        wanted = case
        if processor:
            theirs = processor.encode(case)
            if ids != theirs:
                raise RecipeError(
                    "parity gate: SentencePiece and the fast tokenizer disagree on "
                    f"{_around(case, ids, theirs)}. Another tokenizer.seed or vocab_size may avoid it"
                )
            report["identical_ids"] = report.get("identical_ids", 0) + 1
            wanted = case.replace("▁", " ")
        report["with_u2581"] += "▁" in case
        back = tokenizer.decode(ids)
        if back != wanted:
            place = next((i for i, (a, b) in enumerate(zip(back, wanted, strict=False)) if a != b), len(back))
            shown = slice(max(0, place - 20), place + 60)
            raise RecipeError(
                f"round trip: {wanted[shown]!r} comes back as {back[shown]!r}. The tokenizer loses text"
            )
        report["lossless"] += 1
    return report


def _around(case: str, ids: list[int], others: list[int]) -> str:
    place = next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), 0)
    shown = slice(max(0, place - 3), place + 12)
    return f"{case[:80]!r}, token {place}: {others[shown]} and {ids[shown]}"


def losses(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> dict[str, Any]:
    """How much a tokenizer that may lose text does lose: the share of lines that come back exactly.

    Also the share of unknown tokens, and a few lines that change.
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


def compression(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> dict[str, float]:
    """Bytes and characters per token (no control tokens counted), and the shares of tokens that are unknown
    and that hold less than a character.
    """
    ids = encode_texts(tokenizer, texts)
    tokens = sum(map(len, ids))
    counts = Counter(i for row in ids for i in row)
    parts = sum(counts[i] for i in byte_pieces(tokenizer))
    return {
        "tokens": tokens,
        "bytes_per_token": sum(len(text.encode("utf-8")) for text in texts) / max(1, tokens),
        "characters_per_token": sum(map(len, texts)) / max(1, tokens),
        "byte_fallback_rate": parts / max(1, tokens),
        "unknown_rate": counts[tokenizer.unk_token_id] / max(1, tokens) if tokenizer.unk_token else 0.0,
    }


def byte_pieces(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """The ids whose piece holds bytes that are no whole characters."""
    return {i for i, piece in spelling(tokenizer).items() if isinstance(piece, bytes)}


def spelling(tokenizer: PreTrainedTokenizerFast) -> dict[int, str | bytes]:
    """What each id spells: text, or bytes where they are no whole characters."""
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
    alphabet = _byte_alphabet() if '"ByteLevel"' in json.dumps(decoder) else {}
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


def _byte_alphabet() -> dict[str, int]:
    """The byte for which each character stands in byte-level BPE (Radford et al., 2019): printable Latin-1
    for itself, the other bytes from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


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


def script(piece: str | bytes) -> str:
    """The script of a piece, one of SCRIPTS but for ``control``; spaces in it do not count."""
    if isinstance(piece, bytes):
        return "bytes"
    kinds = {_character_script(character) for character in piece if not character.isspace()} or {"symbols"}
    if len(kinds) == 1:
        return kinds.pop()
    return "mixed Japanese" if kinds <= {"hiragana", "katakana", "kanji"} else "other"


def _character_script(character: str) -> str:
    if character in "ー々〆〇":  # their names tell otherwise
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


def vocabulary(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Size, number of pieces by script, and the longest pieces of a tokenizer."""
    spelt, control = spelling(tokenizer), set(tokenizer.all_special_ids)
    counts = Counter("control" if i in control else script(piece) for i, piece in spelt.items())
    words = [piece for i, piece in spelt.items() if isinstance(piece, str) and i not in control]
    return {
        "size": len(tokenizer),
        "scripts": {name: counts[name] for name in SCRIPTS},
        "longest": sorted(words, key=lambda word: (-len(word), word))[:20],
    }


def split(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    """The pieces of a text as people read them; bytes that are no whole characters as ``<E5>``."""
    spelt = spelling(tokenizer)
    return [
        piece if isinstance(piece, str) else "".join(f"<{byte:02X}>" for byte in piece)
        for piece in (spelt[i] for i in encode_text(tokenizer, text))
    ]


# ------------------------------------------------------------------------------------------------- report


def describe(tokenizers: dict[str, PreTrainedTokenizerFast], texts: dict[str, list[str]]) -> dict[str, Any]:
    """Compression by source, vocabulary and comparison sentences of tokenizers, by their names."""
    return {
        name: {
            "sources": {source: compression(tokenizer, part) for source, part in texts.items() if part},
            "vocabulary": vocabulary(tokenizer),
            "sentences": [split(tokenizer, sentence) for sentence in COMPARISON],
        }
        for name, tokenizer in tokenizers.items()
    }


def markdown(tokenizers: dict[str, dict[str, Any]], proof: dict[str, Any], missing: dict[str, str]) -> str:
    """The report as tables. tokenizers: what `describe` gives; missing: why one could not be compared."""
    lines = ["# Tokenizer", "", "| proof | |", "|---|---:|"]
    lines += [
        f"| {key.replace('_', ' ')} | {_cell(value)} |" for key, value in proof.items() if key != "changed"
    ]
    lines += ["", "## Held-out text", "", "| tokenizer | source | bytes/token | characters/token | "]
    lines[-1] += "tokens below a character | unknown |"
    lines.append("|---|---|---:|---:|---:|---:|")
    for name, figures in tokenizers.items():
        for source, row in figures["sources"].items():
            lines.append(
                f"| {name} | {source} | {row['bytes_per_token']:.3f} | {row['characters_per_token']:.3f} | "
                f"{row['byte_fallback_rate']:.3%} | {row['unknown_rate']:.3%} |"
            )
    lines += ["", "## Vocabulary", "", "| tokenizer | size | " + " | ".join(SCRIPTS) + " |"]
    lines.append("|---|---:|" + "---:|" * len(SCRIPTS))
    for name, figures in tokenizers.items():
        found = figures["vocabulary"]
        cells = " | ".join(f"{found['scripts'][kind]:,}" for kind in SCRIPTS)
        lines.append(f"| {name} | {found['size']:,} | {cells} |")
    for name, figures in tokenizers.items():
        longest = " ".join(f"`{_visible(piece)}`" for piece in figures["vocabulary"]["longest"])
        lines += ["", f"Longest pieces of {name}: {longest}"]
    lines += ["", "## The same sentences"]
    for place, sentence in enumerate(COMPARISON):
        lines += ["", sentence, ""]
        for name, figures in tokenizers.items():
            parts = figures["sentences"][place]
            lines.append(f"- {name}, {len(parts)} tokens: `{'|'.join(map(_visible, parts))}`")
    if missing:
        lines += ["", "## Not compared", ""] + [f"- {name}: {reason}" for name, reason in missing.items()]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4%}"


def _visible(piece: str) -> str:
    """A piece on one line of Markdown."""
    return piece.replace("\n", "␊").replace("\t", "␉").replace("`", "ˋ").replace("|", "¦")


def picture(tokenizers: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw bytes per token by source, and the scripts' shares of the vocabulary, of all side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    width = 0.8 / len(tokenizers)
    for place, (name, figures) in enumerate(tokenizers.items()):
        rows = {source: row["bytes_per_token"] for source, row in figures["sources"].items()}
        vocabulary_size = figures["vocabulary"]["size"]
        shares = {kind: count / vocabulary_size for kind, count in figures["vocabulary"]["scripts"].items()}
        for axis, bars in zip(axes, (rows, shares), strict=True):
            axis.bar([i + place * width for i in range(len(bars))], bars.values(), width, label=name)
            axis.set_xticks([i + 0.4 - width / 2 for i in range(len(bars))], bars, rotation=30, ha="right")
            axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("bytes per token, held-out text")
    axes[1].set_ylabel("share of the vocabulary")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
