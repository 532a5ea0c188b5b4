"""MinHash over character n-grams: which documents are probably near duplicates."""

from __future__ import annotations

import re
import unicodedata

import numpy as np

# Defaults of `minhash` in dataset.json: the usual numbers for web text (FineWeb, Swallow). Documents of
# Jaccard similarity s are found with the probability 1 - (1 - s^rows)^bands: .05 at s = .5, .77 at .75,
# .92 at .8, 1.0 at .9.
MINHASH = {"bands": 14, "rows": 8, "ngram": 5, "seed": 1}
KEY_BITS = 60  # datatrove's reader of 64-bit signatures silently stops at 2^61 - 1

_SHINGLES_AT_ONCE = 1 << 10  # x 112 hash functions x 4 bytes: fits into the second-level cache
_LETTERS = re.compile(r"[^\W_]+")


def fold(text: str, gap: str = "") -> str:
    """The letters and digits of a text, in NFKC and lower case: texts with equal ones are copies.

    gap: replaces each run of other characters (white space, punctuation, symbols). Voiced and unvoiced kana
    stay different (が is not か); their half-width and decomposed forms become equal.
    """
    return gap.join(_LETTERS.findall(unicodedata.normalize("NFKC", text).lower()))


class MinHash:
    """Signatures of texts: the minima of ``bands * rows`` hash functions over the character n-grams.

    The n-grams are those of the folded text with one space for each gap. Each is hashed once to 32 bits x, as
    a polynomial over its code points. Hash function i is a_i x + b_i mod 2^32 with an odd a_i, which is a
    permutation of the 32-bit numbers.
    """

    def __init__(self, bands: int, rows: int, ngram: int, seed: int) -> None:
        self.bands, self.rows, self.ngram = bands, rows, ngram
        # The stream of RandomState is the same in every version of numpy.
        draw = np.random.RandomState(seed)
        self._a, self._b = draw.randint(0, 1 << 32, (2, bands * rows, 1), np.uint32)
        self._a |= np.uint32(1)
        self._key = draw.randint(0, 1 << 64, (rows,), np.uint64) | np.uint64(1)

    def signature(self, text: str) -> np.ndarray | None:
        """The ``(bands * rows,)`` uint32 minima; None if the folded text is shorter than an n-gram."""
        codes = np.frombuffer(fold(text, " ").encode("utf-32-le"), np.uint32)
        count = len(codes) - self.ngram + 1
        if count < 1:
            return None
        minima = np.full(self.bands * self.rows, 0xFFFFFFFF, np.uint32)
        for start in range(0, count, _SHINGLES_AT_ONCE):
            stop = min(start + _SHINGLES_AT_ONCE, count)
            hashes = self._a * self._shingles(codes[start : stop + self.ngram - 1])
            hashes += self._b
            np.minimum(minima, hashes.min(axis=1), out=minima)
        return minima

    def keys(self, text: str) -> np.ndarray | None:
        """The ``(bands,)`` uint64 keys, each a hash of a band's minima; None as in `signature`."""
        minima = self.signature(text)
        if minima is None:
            return None
        return (minima.reshape(self.bands, self.rows) * self._key).sum(axis=1) >> np.uint64(64 - KEY_BITS)

    def _shingles(self, codes: np.ndarray) -> np.ndarray:
        """The 32-bit hash of every n-gram of some code points."""
        count = len(codes) - self.ngram + 1
        hashes = codes[:count].astype(np.uint64)
        for i in range(1, self.ngram):
            hashes *= np.uint64(0x9E3779B97F4A7C15)  # odd, of 2^64 / golden ratio
            hashes += codes[i : i + count]
        # The polynomial and the hash functions are linear: the shift makes similar n-grams independent.
        hashes ^= hashes >> np.uint64(32)
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        return (hashes >> np.uint64(32)).astype(np.uint32)
