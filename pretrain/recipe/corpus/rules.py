"""Rules with thresholds that drop documents of low quality, in sets for the kinds of sources.

The set ``web`` has the rules of Swallow v1 (Okazaki et al. 2024, Building a Large Japanese Web Corpus for
Large Language Models, arXiv:2404.17733; its rules against repetition are from Rae et al. 2021,
arXiv:2112.11446), and then those of LLM-jp (LLM-jp 2024, arXiv:2407.03963): counts of words from lists, and
the ratio of compression. These rules reject literature and articles. The sets ``encyclopaedia`` and ``books``
therefore require only a length and a share of Japanese, with thresholds of our own. Every set has every rule:
`dataset.json` changes a threshold, and null switches a rule off.

The check of a configuration uses `RULES` and `check_rules` only; numpy is imported when a text is measured.
"""

from __future__ import annotations

import functools
import json
import math
import re
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from recipe.project import Refused, nearest

if TYPE_CHECKING:
    import numpy as np

_WEB: dict[str, int | float | None] = {
    "minimum_characters": 400,
    "minimum_japanese_characters": 400,
    "minimum_japanese_share": 0.5,
    "minimum_hiragana_share": 0.2,
    "maximum_katakana_share": 0.5,
    "maximum_sentence": 200,
    "minimum_mean_sentence": 20.0,
    "maximum_mean_sentence": 90.0,
    "maximum_ellipsis_share": 0.2,
    "maximum_duplicate_paragraphs": 0.30,
    "maximum_duplicate_paragraph_characters": 0.20,
    "maximum_duplicate_sentences": 0.30,
    "maximum_duplicate_sentence_characters": 0.20,
    "maximum_top_2gram": 0.20,
    "maximum_top_3gram": 0.18,
    "maximum_top_4gram": 0.16,
    "maximum_duplicate_5grams": 0.15,
    "maximum_duplicate_6grams": 0.14,
    "maximum_duplicate_7grams": 0.13,
    "maximum_duplicate_8grams": 0.12,
    "maximum_duplicate_9grams": 0.11,
    "maximum_duplicate_10grams": 0.10,
    "maximum_advertisement_words": 10,
    "maximum_adult_words": 3,
    "maximum_discrimination_words": 3,
    "maximum_violence_words": 3,
    "minimum_zlib_ratio": 0.30,
    "maximum_zlib_ratio": 0.70,
}
_LENGTH_ONLY = dict.fromkeys(_WEB) | {"minimum_characters": 100, "minimum_japanese_share": 0.3}
RULES: dict[str, dict[str, int | float | None]] = {
    "web": _WEB,
    "encyclopaedia": _LENGTH_ONLY,
    "books": _LENGTH_ONLY,
}

# Hiragana, katakana (with the length mark), kanji with extension A, and the iteration marks.
HIRAGANA, KATAKANA, KANJI = "\u3041-\u309f", "\u30a1-\u30ff", "\u3400-\u4dbf\u4e00-\u9fff々〆〇"
_SENTENCE = re.compile(r"[^。．！？!?\n]+[。．！？!?]?")
_WORD_LISTS = {"advertisement": 1, "adult": 2, "discrimination": 4, "violence": 8}  # a bit for each
# Odd numbers with mixed bits: 2**64 over the golden ratio, and over the square root of 2. The second must not
# be a power of the first, because sums of two overlapping 5-grams would often be equal then.
_MULTIPLIER, _OTHER = 0x9E3779B97F4A7C15, 0xB504F333F9DE6485


class Statistics:
    """The figures of one text that the rules need; each is computed when it is first used.

    The text is normalised: its lines are its paragraphs. Shares lie between 0 and 1, and are 0 where there is
    nothing to count. An n-gram is of characters.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._repeats: dict[int, _Repeats] = {}

    @functools.cached_property
    def codes(self) -> np.ndarray:
        """The code points, ``(characters,)`` uint32."""
        import numpy as np

        return np.frombuffer(self.text.encode("utf-32-le"), dtype=np.uint32)

    @functools.cached_property
    def kinds(self) -> list[int]:
        """The numbers of characters: other, white space, hiragana, katakana, kanji."""
        import numpy as np

        return np.bincount(_kinds()[np.minimum(self.codes, 0xFFFF)], minlength=5).tolist()

    @property
    def japanese(self) -> int:
        """The number of Japanese letters."""
        return sum(self.kinds[2:])

    @property
    def japanese_share(self) -> float:
        """Japanese letters over all characters that are not white space."""
        return _share(self.japanese, len(self.text) - self.kinds[1])

    @property
    def hiragana_share(self) -> float:
        """Hiragana over all Japanese letters."""
        return _share(self.kinds[2], self.japanese)

    @property
    def katakana_share(self) -> float:
        """Katakana over all Japanese letters."""
        return _share(self.kinds[3], self.japanese)

    @functools.cached_property
    def paragraphs(self) -> list[str]:
        """The lines."""
        return self.text.split("\n")

    @functools.cached_property
    def sentences(self) -> list[str]:
        """The lines, split after 。 and other full stops, question marks and exclamation marks."""
        return _SENTENCE.findall(self.text)

    @functools.cached_property
    def sentence_lengths(self) -> list[int]:
        """Characters of each sentence, its end mark included."""
        return [len(sentence) for sentence in self.sentences]

    @property
    def mean_sentence(self) -> float:
        """The mean length of the sentences in characters."""
        return _share(sum(self.sentence_lengths), len(self.sentences))

    @property
    def ellipsis_share(self) -> float:
        """Sentences that end in … or ・ over all sentences."""
        ends = sum(sentence.rstrip().endswith(("…", "・")) for sentence in self.sentences)
        return _share(ends, len(self.sentences))

    @functools.cached_property
    def _top_character(self) -> int:
        """An upper bound of the count of the most frequent character: characters in 1,024 buckets."""
        import numpy as np

        return int(np.bincount(self.codes & 0x3FF).max())

    def top_ngram_exceeds(self, n: int, share: float) -> bool:
        """Whether the most frequent n-gram makes up more than `share` of all n-grams."""
        import numpy as np

        total = len(self.text) - n + 1
        # No n-gram is more frequent than its characters.
        if total < 1 or self._top_character / total <= share:
            return False
        hashes = np.sort(self._hashes(n))
        starts = np.flatnonzero(hashes[1:] != hashes[:-1]) + 1
        return int(np.diff(starts, prepend=0, append=total).max()) / total > share

    def duplicate_ngrams_exceed(self, n: int, share: float) -> bool:
        """Whether more than `share` of the distinct n-grams occur more than once, for n from 5 to 10.

        What occurs again as an n-gram begins with a 5-gram, a 6-gram, and so on that occur again. Such places
        bound the answer: of `places` out of `total`, at most places / 2 distinct n-grams can be repeated, of
        at least total - places / 2.
        """
        total = len(self.text) - n + 1
        if total < 1:
            return False
        for size in range(6, n + 1):
            places = min(len(self._repeated(size - 1).longer), total)
            if places / (2 * total - places) <= share:
                return False
        repeats = self._repeated(n)
        return repeats.distinct / (total - repeats.places + repeats.distinct) > share

    def _repeated(self, n: int) -> _Repeats:
        """Which n-grams occur more than once, for n from 5 to 10."""
        import numpy as np

        if n not in self._repeats:
            if n == 5:
                places, hashes = np.arange(len(self._fives)), self._fives
            else:  # its first and its last 5-gram identify the n-gram
                places = self._repeated(n - 1).longer
                hashes = self._fives[places] * np.uint64(_OTHER) + self._fives[places + n - 5]
            order = np.argsort(hashes)
            hashes = hashes[order]
            again = np.concatenate(([False], hashes[1:] == hashes[:-1], [False]))
            distinct = int(np.count_nonzero(again[1:] & ~again[:-1]))
            places = np.sort(places[order[again[1:] | again[:-1]]])
            longer = places[:-1][places[1:] == places[:-1] + 1]
            self._repeats[n] = _Repeats(len(places), distinct, longer)
        return self._repeats[n]

    @functools.cached_property
    def _fives(self) -> np.ndarray:
        return self._hashes(5)

    def _hashes(self, n: int) -> np.ndarray:
        """The n-gram at each position as one uint64; n is at most the length of the text.

        A polynomial of the code points modulo 2**64: two different n-grams are equal with probability 2**-64.
        """
        import numpy as np

        codes = self.codes.astype(np.uint64)
        hashes = codes[: len(codes) - n + 1]
        for offset in range(1, n):
            hashes = hashes * np.uint64(_MULTIPLIER) + codes[offset : offset + len(hashes)]
        return hashes

    @functools.cached_property
    def _word_positions(self) -> tuple[np.ndarray, np.ndarray]:
        """The positions where words of the lists may begin, and the bits of those lists."""
        import numpy as np

        lists = np.zeros(len(self.codes), dtype=np.uint8)
        hashes = self.codes
        for size, begins in enumerate(_word_lists()[0]):
            if size:
                hashes = _longer(hashes[:-1], self.codes[size:])
            lists[: len(hashes)] |= begins[hashes & 0xFFFF]
        places = np.flatnonzero(lists)
        return places, lists[places]

    def words_exceed(self, name: str, count: int) -> bool:
        """Whether words of one of HojiChar's lists occur more than `count` times in all.

        Words do not overlap. A word in katakana counts only if there is no katakana directly before or after.
        """
        places, lists = self._word_positions
        places = places[(lists & _WORD_LISTS[name]) > 0]
        if len(places) <= count:
            return False
        patterns = _word_lists()[1][name]
        found = end = 0
        for place in places.tolist():
            if place >= end and (pattern := patterns.get(self.text[place])):
                match = pattern.match(self.text, place)
                if match:
                    found, end = found + 1, match.end()
        return found > count

    @functools.cached_property
    def zlib_ratio(self) -> float:
        """UTF-8 bytes after compression by zlib (level 9) over bytes before."""
        raw = self.text.encode("utf-8")
        return _share(len(zlib.compress(raw, 9)), len(raw))


class _Repeats(NamedTuple):
    """The n-grams that occur more than once: the number of their positions, and of distinct ones.

    longer: the sorted positions where an (n+1)-gram may occur more than once, because the n-grams at this
    position and at the next one do.
    """

    places: int
    distinct: int
    longer: np.ndarray


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _duplicates(parts: list[str]) -> float:
    """Parts that occurred before, over all parts."""
    return _share(len(parts) - len(set(parts)), len(parts))


def _duplicate_characters(parts: list[str]) -> float:
    """Characters of parts that occurred before, over the characters of all parts."""
    total = sum(map(len, parts))
    return _share(total - sum(map(len, set(parts))), total)


@functools.cache
def _kinds() -> np.ndarray:
    """The kind of every character of the Basic Multilingual Plane, as `Statistics.kinds` counts them."""
    import numpy as np

    kinds = np.zeros(0x10000, dtype=np.uint8)
    plane = "".join(map(chr, range(0x10000)))
    for kind, members in enumerate((r"\s", f"[{HIRAGANA}]", f"[{KATAKANA}]", f"[{KANJI}]"), 1):
        kinds[[match.start() for match in re.finditer(members, plane)]] = kind
    return kinds


def _longer(hashes: Any, codes: Any) -> Any:
    """The hash of some characters and the next one, from the hash of the former (also for arrays)."""
    return hashes * 31 ^ codes


@functools.cache
def _word_lists() -> tuple[np.ndarray, dict[str, dict[str, re.Pattern[str]]]]:
    """The word lists of the package hojichar.

    Returns a uint8 table (3, 65536): which lists have a word of one character, a word of two, a longer one
    beginning with three, whose hash ends in these 16 bits; and, by list and first character, the pattern of
    its words, the longest first.
    """
    import importlib.resources

    import numpy as np

    begins = np.zeros((3, 0x10000), dtype=np.uint8)
    patterns = {}
    for name, bit in _WORD_LISTS.items():
        path = importlib.resources.files("hojichar").joinpath(f"dict/{name}_keywords_ja.txt")
        words: dict[str, list[str]] = {}
        for word in sorted(filter(None, map(str.strip, path.read_text("utf-8").split("\n"))), key=len)[::-1]:
            katakana = re.fullmatch("[ァ-ヴー]+", word)
            pattern = f"(?<![ァ-ヴー]){word}(?![ァ-ヴー])" if katakana else re.escape(word)
            words.setdefault(word[0], []).append(pattern)
            codes = [ord(character) for character in word[:3]]
            begins[len(codes) - 1, functools.reduce(_longer, codes) & 0xFFFF] |= bit
        patterns[name] = {first: re.compile("|".join(found)) for first, found in words.items()}
    return begins, patterns


# Rule: the reason it gives, and whether a text fails it. They are applied in this order: cheap ones first.
_CHECKS: dict[str, tuple[str, Callable[[Statistics, Any], bool]]] = {
    "minimum_characters": ("short", lambda text, least: len(text.text) < least),
    "minimum_japanese_characters": ("few Japanese characters", lambda text, least: text.japanese < least),
    "minimum_japanese_share": ("not Japanese", lambda text, least: text.japanese_share < least),
    "minimum_hiragana_share": ("few hiragana", lambda text, least: text.hiragana_share < least),
    "maximum_katakana_share": ("much katakana", lambda text, most: text.katakana_share > most),
    "maximum_sentence": ("long sentence", lambda text, most: max(text.sentence_lengths, default=0) > most),
    "minimum_mean_sentence": ("short sentences", lambda text, least: text.mean_sentence < least),
    "maximum_mean_sentence": ("long sentences", lambda text, most: text.mean_sentence > most),
    "maximum_ellipsis_share": ("ellipses", lambda text, most: text.ellipsis_share > most),
    "maximum_duplicate_paragraphs": (
        "duplicate paragraphs",
        lambda text, most: _duplicates(text.paragraphs) > most,
    ),
    "maximum_duplicate_paragraph_characters": (
        "duplicate paragraph characters",
        lambda text, most: _duplicate_characters(text.paragraphs) > most,
    ),
    "maximum_duplicate_sentences": (
        "duplicate sentences",
        lambda text, most: _duplicates(text.sentences) > most,
    ),
    "maximum_duplicate_sentence_characters": (
        "duplicate sentence characters",
        lambda text, most: _duplicate_characters(text.sentences) > most,
    ),
}
for _n in (2, 3, 4):
    _CHECKS[f"maximum_top_{_n}gram"] = (
        f"frequent {_n}-gram",
        lambda text, most, n=_n: text.top_ngram_exceeds(n, most),
    )
for _n in range(5, 11):
    _CHECKS[f"maximum_duplicate_{_n}grams"] = (
        f"repeated {_n}-grams",
        lambda text, most, n=_n: text.duplicate_ngrams_exceed(n, most),
    )
for _name in _WORD_LISTS:
    _CHECKS[f"maximum_{_name}_words"] = (
        f"{_name} words",
        lambda text, most, name=_name: text.words_exceed(name, most),
    )
_CHECKS["minimum_zlib_ratio"] = ("zlib ratio low", lambda text, least: text.zlib_ratio < least)
_CHECKS["maximum_zlib_ratio"] = ("zlib ratio high", lambda text, most: text.zlib_ratio > most)


def japanese_share(text: str) -> float:
    """Japanese letters over all characters that are not white space, 0 for an empty text."""
    return Statistics(text).japanese_share


def make_rules(kind: str | None, changes: dict[str, Any]) -> Callable[[str], str]:
    """The filter of a set of rules: a function that gives the reason of the first rule a text fails, or "".

    kind: a key of `RULES`, or None, where every rule is off. changes: other thresholds by rule; None switches
    a rule off. `check_rules` has checked both. The text is normalised already.
    """
    values = (RULES[kind] if kind else {}) | changes
    active = [
        (reason, fails, values[rule])
        for rule, (reason, fails) in _CHECKS.items()
        if values.get(rule) is not None
    ]

    def first_failure(text: str) -> str:
        statistics = Statistics(text)
        return next((reason for reason, fails, value in active if fails(statistics, value)), "")

    return first_failure


def check_rules(kind: Any, changes: Any, where: str) -> None:
    """Check a set's name and the thresholds a user gives for it.

    where: how a message begins, such as ``configs/web/dataset.json: rules.web``. Raises Refused, with the
    nearest known name, for an unknown set or rule, a wrong type, or a threshold out of range.
    """
    if not isinstance(kind, str) or kind not in RULES:
        raise Refused(
            f"{where}: unknown set of rules {json.dumps(kind)}.{nearest(str(kind), RULES)} "
            f"Known: {', '.join(RULES)}"
        )
    if not isinstance(changes, dict):
        raise Refused(f"{where}: {json.dumps(changes)}, expected an object {{RULE: threshold or null}}")
    for rule, value in changes.items():
        if rule not in _WEB:
            raise Refused(f"{where}: {rule}: unknown rule (value {json.dumps(value)}).{nearest(rule, _WEB)}")
        whole = isinstance(_WEB[rule], int)
        # The names say what a share is. The ratio of compression may be above 1 for random bytes.
        most = 1 if "_share" in rule or "duplicate" in rule or "_top_" in rule else math.inf
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if value is None or (number and 0 <= value <= most):
            continue
        expected = "a whole number" if whole else "a number"
        raise Refused(
            f"{where}: {rule}: {json.dumps(value, ensure_ascii=False)}, expected {expected} "
            f"{'from 0 to 1' if most == 1 else 'of 0 or more'}, or null to switch the rule off"
        )
