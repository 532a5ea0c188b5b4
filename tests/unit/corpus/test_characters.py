"""Dialogues: characters are normalised as in the pretraining text, the layout stays."""

from collections import Counter

import pytest
from recipe.corpus.characters import make_dialogue_normalizer
from recipe.corpus.normalizing import make_normalizer

CODE = """次の関数です。

```python
def f(n):
    for i in range(n):  # 偶数 だけ

\tif i % 2 == 0: print("a --- b", ~i)
```

- 親の項目
  - 子の項目
　字下げ
| 列 a | 列 b |
├── 枝 ──── ーーー 10–20 x−1"""


def test_the_layout_comes_back_exactly():
    assert make_dialogue_normalizer({})(CODE) == CODE
    assert make_dialogue_normalizer({})("    return 1") == "    return 1"


def test_only_empty_lines_at_the_beginning_and_white_space_at_the_end_are_removed():
    assert make_dialogue_normalizer({})("\n \t\n  - 項目\n\n  - 二 \n \n") == "  - 項目\n\n  - 二"
    assert make_dialogue_normalizer({})(" \n　\n") == ""


@pytest.mark.parametrize("config", [{}, {"nfkc": True}, {"neologdn": {"tilde": "normalize"}}])
def test_characters_are_those_of_the_pretraining_text(config):
    # One at a time: neologdn also shortens runs and removes spaces, which dialogues keep.
    letters = [chr(code) for code in (*range(0xFF01, 0xFF0D), *range(0xFF0E, 0xFF5F), *range(0xFF61, 0xFF9E))]
    clean, reference = make_dialogue_normalizer(config), make_normalizer(config)
    for character in [*letters, *"ｶﾞﾊﾟ", "ｶﾞ", "ﾊﾟ", "～", "〜", "‘", "“"]:
        assert clean(f"山{character}山") == reference(f"山{character}山")


def test_tildes_hyphens_kana_and_line_ends():
    text = "ﾌﾟﾛｸﾞﾗﾑ　Ｌｉｎｕｘ １０～２０ ~/か\u3099 ０３－１２\r\nか\ry\u2028z"
    kept = make_dialogue_normalizer({})(text)
    assert kept == "プログラム　Linux 10〜20 ~/が 03-12\nか\ny\nz"
    assert make_dialogue_normalizer({"keep_wave_dash": False})("１０～２０ ~/a") == "1020 ~/a"
    assert make_dialogue_normalizer({"nfkc": True})("  ①　㍿") == "  1 株式会社"


def test_runs_of_half_width_kana_are_not_shortened():
    assert make_dialogue_normalizer({})("ﾜｰｰｰ ｶﾞｶﾞ カﾞ ﾊﾟ") == "ワーーー ガガ ガ パ"


def test_invisible_and_decomposed_characters_are_repaired_and_counted():
    text = "  日本\u200b語\x80の\ufeffcafe\u0301、か\u3099\U0001ffff👨\u200d👩"
    figures = Counter()
    clean = make_dialogue_normalizer({}, figures)(text)
    assert clean == "  日本語のcafé、が👨\u200d👩" == "  " + make_normalizer({})(text)
    assert figures == {"invisible characters removed": 4, "characters composed": 2}
    assert make_dialogue_normalizer({"clean_characters": False})(text) == text


def test_half_a_surrogate_pair_is_an_error():
    with pytest.raises(UnicodeError):
        make_dialogue_normalizer({})("山\ud800")
