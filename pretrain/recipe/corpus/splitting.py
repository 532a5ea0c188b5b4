"""The identity of a text, and the side of the split that it decides."""

from __future__ import annotations

import hashlib

VALID_SHARE = 0.05  # of the documents, where dataset.json gives none


def text_hash(text: str) -> bytes:
    """The 16-byte BLAKE2b hash of a text, the identity of a document."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def is_valid_side(identity: bytes, share: float) -> bool:
    """Whether a document belongs to the validation side.

    Its hash decides, so that adding data moves no other document.
    """
    return int.from_bytes(identity[:8], "big") < share * 2**64
