"""From raw documents to clean ones: normalise, filter, drop exact duplicates, split; with every document
counted.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import neologdn

from recipe.sources import Document

# Hiragana, katakana (with the length mark), kanji with extension A, and the iteration marks.
JAPANESE = re.compile(r"[\u3041-\u309f\u30a1-\u30ff\u3400-\u4dbf\u4e00-\u9fff々〆〇]")
_SPACE = re.compile(r"\s+")
_NOT_TEXT = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f\ud800-\udfff]"
)  # control characters and halves of surrogate pairs


class CleanDocument(NamedTuple):
    """A document that is kept: `id` is the hash of its text in hex, `valid` the side of the split."""

    id: str
    source: str
    text: str
    valid: bool


@dataclass
class Funnel:
    """What went into one source and what became of it, in documents and UTF-8 bytes.

    bytes in = out + sum(dropped) + trimmed holds exactly; `trimmed` is what normalising took from kept
    documents.
    """

    documents_in: int = 0
    documents_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    bytes_trimmed: int = 0
    lines_in: int = 0
    lines_out: int = 0
    documents_dropped: Counter[str] = field(default_factory=Counter)
    bytes_dropped: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        """The form in which ``funnel.json`` holds it."""
        return {
            "documents": {
                "in": self.documents_in,
                "out": self.documents_out,
                "dropped": dict(self.documents_dropped),
            },
            "bytes": {
                "in": self.bytes_in,
                "out": self.bytes_out,
                "dropped": dict(self.bytes_dropped),
                "trimmed": self.bytes_trimmed,
            },
            "lines_of_kept_documents": {"in": self.lines_in, "out": self.lines_out},
        }


def make_normalizer(config: dict[str, Any]) -> Callable[[str], str]:
    """The normaliser that a dataset.json describes: neologdn line by line, lines that become empty left out.

    ``keep_wave_dash`` (on by default): 〜 (U+301C) and its look-alike ～ (U+FF5E) stay, as 〜. neologdn
    alone deletes both, which turns 10〜20時 into 1020時. An ASCII ``~`` is left alone, it stands in paths.
    """
    options = {
        "tilde": "ignore" if config.get("keep_wave_dash", True) else "remove",
        **config.get("neologdn", {}),
    }

    def normalize(text: str) -> str:
        lines = (neologdn.normalize(line, **options) for line in text.replace("～", "〜").splitlines())
        return "\n".join(line for line in lines if line)

    return normalize


def japanese_share(text: str) -> float:
    """Japanese letters over all characters that are not white space, 0 for an empty text."""
    solid = _SPACE.sub("", text)
    return len(JAPANESE.findall(solid)) / len(solid) if solid else 0.0


def text_hash(text: str) -> bytes:
    """The 16-byte BLAKE2b hash of a text, the identity of a document."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def is_valid_side(identity: bytes, share: float) -> bool:
    """Whether a document belongs to the validation side: decided by its own hash, so adding data moves
    nothing.
    """
    return int.from_bytes(identity[:8], "big") < share * 2**64


def clean(
    documents: Iterable[Document], source: str, config: dict[str, Any], seen: set[bytes], funnel: Funnel
) -> Iterator[CleanDocument]:
    """Yield the documents of one source that are worth keeping, and count every one in `funnel`.

    seen: hashes of the texts kept so far, over all sources; exact duplicates are dropped by it.
    A held-out source stands wholly on the validation side.
    """
    normalize = make_normalizer(config)
    held_out = config["sources"][source].get("held_out", False)
    for document in documents:
        size = len(document.text.encode("utf-8", errors="replace"))
        funnel.documents_in += 1
        funnel.bytes_in += size
        text, reason = document.text, document.dropped
        if not reason and _NOT_TEXT.search(text):
            reason = "control characters"
        if not reason:
            text = normalize(text)
            reason = _reason_to_drop(text, config)
        identity = text_hash(text) if not reason else b""
        if identity in seen:
            reason = "duplicate"
        if reason:
            funnel.documents_dropped[reason] += 1
            funnel.bytes_dropped[reason] += size
            continue
        seen.add(identity)
        kept = len(text.encode("utf-8"))
        funnel.documents_out += 1
        funnel.bytes_out += kept
        funnel.bytes_trimmed += size - kept
        funnel.lines_in += len(document.text.splitlines())
        funnel.lines_out += len(text.splitlines())
        yield CleanDocument(
            identity.hex(), source, text, held_out or is_valid_side(identity, config.get("valid_share", 0.05))
        )


def _reason_to_drop(text: str, config: dict[str, Any]) -> str:
    if not text:
        return "empty"
    if len(text) < config.get("minimum_characters", 0):
        return "short"
    if japanese_share(text) < config.get("minimum_japanese_share", 0.0):
        return "not Japanese"
    return ""
