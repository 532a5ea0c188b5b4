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

from recipe.normalizing import make_normalizer
from recipe.rules import RULES, make_rules
from recipe.sources import Document

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


def make_cleaner(config: dict[str, Any], source: dict[str, Any]) -> Callable[[str], tuple[str, str]]:
    """What cleans one text of a source: gives the text as it is kept, and the reason to drop it or "".

    config: a dataset.json; source: one of its sources. Its key ``rules`` names the set of rules, or is null
    or missing; the thresholds of a set are changed by ``config["rules"][SET]``. minimum_characters and
    minimum_japanese_share of the config itself hold for every source: a set can only ask for more.
    """
    normalize = make_normalizer(config)
    kind = source.get("rules")
    changes = dict(config.get("rules", {}).get(kind, {}))
    for rule in ("minimum_characters", "minimum_japanese_share"):
        own = (RULES[kind] | changes)[rule] if kind else None
        changes[rule] = max(own or 0, config.get(rule, 0)) or None
    first_failure = make_rules(kind, changes)

    def clean_text(text: str) -> tuple[str, str]:
        if _NOT_TEXT.search(text):
            return text, "control characters"
        text = normalize(text)
        return text, first_failure(text) if text else "empty"

    return clean_text


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
    clean_text = make_cleaner(config, config["sources"][source])
    held_out = config["sources"][source].get("held_out", False)
    for document in documents:
        size = len(document.text.encode("utf-8", errors="replace"))
        funnel.documents_in += 1
        funnel.bytes_in += size
        text, reason = document.text, document.dropped
        if not reason:
            text, reason = clean_text(text)
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
