"""Normalising: identical to neologdn line by line, for every character, every option and any neighbours.

What is kept or repaired on top of neologdn is switched off for that, and tested on its own.
"""

import itertools
import random
import unicodedata
from collections import Counter

import neologdn
import pytest
from recipe.config.dataset import TILDES
from recipe.corpus.normalizing import make_normalizer

EXACT = {"keep_dashes": False, "clean_characters": False}
BMP = [chr(code) for code in (*range(0xD800), *range(0xE000, 0x10000))]
# One of each kind that neologdn treats differently, twice the rare ones that stand near each other.
KINDS = list("  　aZ0-*~é!あうはーカハヴ漢々。、「ｱｶﾊｰﾞﾟ゛゜（！＊ＡΑ９‐−–－―━〜～∼〰\t\x00㐀α①㌔ﾠ") + [
    "𠮷",
    "😀",
    "\ufeff",
]


def reference(text, options):
    """neologdn on every line, without the empty lines."""
    lines = (neologdn.normalize(line, **options) for line in text.replace("～", "〜").splitlines())
    return "\n".join(line for line in lines if line)


def assert_same(lines, options, config):
    """The lines as one text give neologdn's output; a difference is shown by its first line."""
    text = "\n".join(lines)
    assert len(text) > 1000  # long enough for the array operations
    expected, seen = reference(text, options), make_normalizer(EXACT | config)(text)
    if seen != expected:
        pairs = zip(seen.split("\n"), expected.split("\n"), strict=False)
        pytest.fail(f"{next((pair for pair in pairs if pair[0] != pair[1]), 'another number of lines')}")


@pytest.mark.parametrize("tilde", TILDES)
@pytest.mark.parametrize("remove_space", [True, False])
def test_every_character_between_all_kinds_of_neighbours(tilde, remove_space):
    options = {"tilde": tilde, "remove_space": remove_space}
    around = [("", ""), ("a", "a"), ("a ", " a"), ("あ ", " あ"), ("* ", " *"), ("α ", " α"), ("カ", "ﾞ")]
    lines = [left + c + right for left, right in around for c in BMP]
    lines += [c + c for c in BMP]
    assert_same(lines, options, {"neologdn": options})


@pytest.mark.parametrize("tilde", TILDES)
@pytest.mark.parametrize("remove_space", [True, False])
def test_random_lines(tilde, remove_space):
    options = {"tilde": tilde, "remove_space": remove_space}
    generator = random.Random(0)
    lines = ["".join(generator.choices(KINDS, k=generator.randrange(14))) for _ in range(60_000)]
    lines += ["".join(three) for three in itertools.product(KINDS, repeat=3)]
    assert_same(lines, options, {"neologdn": options})


@pytest.mark.parametrize("repeat", [1, 2, 5])
@pytest.mark.parametrize("longest", [0, 1, 3, 8])
def test_repeats(repeat, longest):
    options = {"tilde": "ignore", "repeat": repeat, "max_repeat_substr_length": longest}
    generator = random.Random(repeat)
    lines = ["".join(generator.choices("あいー無駄 a", k=generator.randrange(30))) for _ in range(1500)]
    lines += ["無駄無駄無駄無駄ァ", "うまああああああああああああああい", "12345678" * 4, "123456789" * 4]
    assert_same(lines, options, {"neologdn": options})


def test_line_ends_are_those_of_splitlines():
    lines = ["行", " ", "\t", "ー", "a", "～"]
    ends = ["\n", "\r", "\r\n", "\n\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
    text = "".join(line + end for line in lines for end in ends) * 3
    assert make_normalizer(EXACT)(text) == reference(text, {"tilde": "ignore"})


@pytest.mark.parametrize("size", range(130))
def test_short_and_long_texts_give_the_same(size):
    """neologdn's loop for short texts and the array operations for long ones give the same."""
    text = ("ﾊﾟ～ソコン　ー ー\n \n" * 20)[:size]
    assert make_normalizer(EXACT)(text) == reference(text, {"tilde": "ignore"})


@pytest.mark.parametrize("length", [1, 100])
def test_wave_dash(length):
    text = "\n".join(["10～20時、10〜20時、~/.bashrc"] * length)
    kept, removed, decided = (
        make_normalizer(config)(text).split("\n")[-1]
        for config in (
            {},
            {"keep_wave_dash": False},
            {"keep_wave_dash": False, "neologdn": {"tilde": "normalize"}},
        )
    )
    assert kept == "10〜20時、10〜20時、~/.bashrc"
    assert removed == "1020時、1020時、/.bashrc"
    assert decided == "10~20時、10~20時、~/.bashrc"


@pytest.mark.parametrize("length", [1, 100])
def test_nfkc_is_off_by_default(length):
    text = "\n".join(["①㍿が。"] * length)
    assert make_normalizer({})(text) == text
    assert make_normalizer({"nfkc": True})(text) == "\n".join(["1株式会社が。"] * length)


@pytest.mark.parametrize("text", ["", "\n", " \n　\n", "～\n", "　" * 200, "\n" * 200])
def test_empty_text_stays_empty(text):
    assert make_normalizer({"keep_wave_dash": False})(text) == ""


@pytest.mark.parametrize("length", [1, 100])
@pytest.mark.parametrize(
    ("raw", "kept", "neologdn_alone"),
    [
        ("０３－１２３４", "03-1234", "03ー1234"),
        ("Ｆ－１６", "F-16", "Fー16"),
        ("東京－大阪", "東京-大阪", "東京ー大阪"),
        ("（－１）", "(-1)", "(ー1)"),
        ("１－－２", "1-2", "1ー2"),
        ("スーパ－とｽｰﾊﾟ－とか－", "スーパーとスーパーとかー", "スーパーとスーパーとかー"),
        ("雨が――静かに", "雨が――静かに", "雨がー静かに"),
        ("——あ──い━━う", "——あ──い━━う", "ーあーいーう"),
        ("a ― b、あ ― い", "a ― b、あ―い", "a ーb、あーい"),
        ("すごーーい", "すごーい", "すごーい"),
        ("--help a–b", "--help a-b", "--help a-b"),
    ],
)
def test_dashes(length, raw, kept, neologdn_alone):
    text = "\n".join([raw] * length)
    assert make_normalizer({})(text) == "\n".join([kept] * length)
    assert make_normalizer({"keep_dashes": False})(text) == "\n".join([neologdn_alone] * length)


@pytest.mark.parametrize("length", [1, 100])
def test_decomposed_characters_are_composed_and_counted(length):
    text = "\n".join(["ガラスのバケツ、ぱんだ、caféの神"] * length)
    decomposed = unicodedata.normalize("NFD", text).replace("神", "\ufa19")
    figures = Counter()
    # A compatibility ideograph is another character than its NFC.
    assert make_normalizer({}, figures)(decomposed) == text.replace("神", "\ufa19")
    assert figures["characters composed"] == 5 * length
    off = make_normalizer({"clean_characters": False})(decomposed)
    assert off == reference(decomposed, {"tilde": "ignore"}) and "\u3099" in off


@pytest.mark.parametrize("length", [1, 100])
@pytest.mark.parametrize(
    "character", [*"\x80\x9f\xad\u200b\u200e\u202e\u2060\u2066\ufeff\ufdd0\ufffe\uffff\U0001fffe\U0010ffff"]
)
def test_invisible_characters_are_removed_and_counted(length, character):
    figures = Counter()
    text = "\n".join([f"日{character}本か{character}\u3099 {character}語"] * length)
    assert make_normalizer({}, figures)(text) == "\n".join(["日本が語"] * length)
    assert figures["invisible characters removed"] == 3 * length


@pytest.mark.parametrize("length", [1, 100])
def test_visible_characters_and_joiners_stay(length):
    text = "\n".join(["👨\u200d👩\u200d👧、葛\U000e0100、𠮷、\U0001f3fb、①"] * length)
    figures = Counter()
    assert make_normalizer({}, figures)(text) == text
    assert not figures.total()


LAYOUT = """# 見出し

次の関数を使います。

```python
def kazoeru(n):
    for i in range(n):
\tif i % 2 == 0:
            print(i)   # 表示
```

- 親の項目
  - 子の項目
* ＡＢＣ ﾊﾟﾝ  がく​、１０～２０時 ――０３－１２３４"""


def test_a_layout_that_is_kept_comes_back_exactly():
    """Only characters change; what is removed or composed is counted."""
    figures = Counter()
    expected = LAYOUT.replace("ＡＢＣ ﾊﾟﾝ  がく​、１０～２０時", "ABC パン  がく、10〜20時")
    expected = expected.replace("０３－１２３４", "03-1234")
    assert make_normalizer({"layout": "keep"}, figures)(f"\r\n{LAYOUT}\n\n") == expected
    assert figures == {"invisible characters removed": 1, "characters composed": 1}


@pytest.mark.parametrize(("tilde", "expected"), [("remove", "1020"), ("normalize", "10~20")])
def test_tildes_of_a_kept_layout(tilde, expected):
    assert make_normalizer({"layout": "keep", "neologdn": {"tilde": tilde}})("10〜20") == expected
    assert make_normalizer({"layout": "keep"})("a\U0001fffe\U0001f600\U0010ffffb") == "a\U0001f600b"
    kept = make_normalizer({"layout": "keep", "clean_characters": False})
    assert kept("a​b⁠") == "a​b⁠"
