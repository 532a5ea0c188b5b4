"""Rules: each rejects a text that all others accept, accepts one at its threshold, and can be off."""

import importlib.resources
import random
import re
import subprocess
import sys
import zlib
from collections import Counter

import pytest
from recipe.corpus.rules import RULES, Statistics, check_rules, japanese_share, make_rules
from recipe.project import Refused

WEB = RULES["web"]
KANA = "あかさたなはまやらわいきしちにひみりうくすつぬ"
KANJI = [chr(0x6000 + 7 * number) for number in range(400)]
KATAKANA = [chr(code) for code in range(0x30A2, 0x30F0)]


def letters(size, seed, *alphabets):
    """`size` random characters, taken from the alphabets in turn."""
    generator = random.Random(seed)
    return "".join(generator.choice(alphabets[place % len(alphabets)]) for place in range(size))


def sentence(size, seed):
    """Prose of `size` characters with the 。 at its end."""
    return letters(size - 1, seed, KANA, KANA, KANJI) + "。"


def prose(*sizes, seed=0, between=""):
    """Sentences of the given sizes, all different."""
    return between.join(sentence(size, f"{seed}-{number}") for number, size in enumerate(sizes))


def cut(stream, size=40):
    """A stream of characters as sentences of `size`."""
    return "".join(stream[at : at + size - 1] + "。" for at in range(0, len(stream), size - 1))


def mixed(count, of, seed, alphabet, others):
    """Sentences with `of` letters, `count` of them from one alphabet, and the rest from others."""
    generator = random.Random(seed)
    kinds = [alphabet] * count + [others] * (of - count)
    generator.shuffle(kinds)
    return cut("".join(generator.choice(kind) for kind in kinds))


def duplicate_share(text, n):
    """Distinct n-grams that occur more than once over all distinct ones, counted one by one."""
    counts = Counter(text[place : place + n] for place in range(len(text) - n + 1))
    return sum(count > 1 for count in counts.values()) / len(counts)


def top_share(text, n):
    """The most frequent n-gram over all n-grams, counted one by one."""
    counts = Counter(text[place : place + n] for place in range(len(text) - n + 1))
    return max(counts.values()) / counts.total()


def repeating(size):
    """Prose in which a passage of `size` characters occurs twice."""
    passage = prose(*[size // 3] * 2, size - 2 * (size // 3), seed="passage")
    return prose(*[40] * 7, seed="before") + passage + prose(*[40] * 6, seed="between") + passage


def repeated_just_too_often(n):
    """A text that repeats one n-gram too many, and one whose passage is a character shorter."""
    size = next(
        s for s in range(60, 200) if duplicate_share(repeating(s), n) > WEB[f"maximum_duplicate_{n}grams"]
    )
    return repeating(size), repeating(size - 1)


def framed(phrase, count, total):
    """A phrase `count` times in `total` characters, with new ones in each gap and every eighth gap a 。"""
    filler = letters(total - count * len(phrase), "frame", KANA, KANJI, KANJI)
    gaps = [filler[number::count] for number in range(count)]
    return "".join(phrase + (gap if number % 8 else "。" + gap[1:]) for number, gap in enumerate(gaps))


def word(name):
    """A word with kanji from a list of HojiChar, which contains no other word of that list."""
    path = importlib.resources.files("hojichar") / f"dict/{name}_keywords_ja.txt"
    words = [line.strip() for line in path.read_text("utf-8").split("\n") if line.strip()]
    return next(w for w in words if re.search("[一-龠]{2}", w) and not any(o in w for o in words if o != w))


def with_words(name, count):
    return "".join(sentence(40, f"{name}{n}")[:-1] + word(name) + "。" for n in range(count)) + prose(
        *[40] * 12
    )


tops = {n: f"maximum_top_{n}gram" for n in (2, 3, 4)}
short_line, short_sentence = "はい、そうです。", "はい。"
copy = sentence(20, "copy")

# rule: (changes of the set, text that fails by this rule only, its twin that passes)
CASES = {
    "minimum_characters": ({"minimum_characters": 600}, prose(*[40] * 14, 39), prose(*[40] * 15)),
    "minimum_japanese_characters": (
        {},
        prose(*[41] * 10).replace("。", "a。", 1)[1:],
        prose(*[41] * 10),
    ),
    "minimum_japanese_share": (
        {},
        mixed(600, 1217, 1, KANA + "".join(KANJI[:40]), "abcdefghijklmnopqrstuvwxyz"),
        mixed(617, 1200, 1, KANA + "".join(KANJI[:40]), "abcdefghijklmnopqrstuvwxyz"),
    ),
    "minimum_hiragana_share": ({}, mixed(99, 500, 1, KANA, KANJI), mixed(100, 500, 1, KANA, KANJI)),
    "maximum_katakana_share": ({}, mixed(251, 500, 1, KATAKANA, KANA), mixed(250, 500, 1, KATAKANA, KANA)),
    "maximum_sentence": ({}, prose(201, *[40] * 8), prose(200, *[40] * 8)),
    "minimum_mean_sentence": ({}, prose(*[20] * 24, 19), prose(*[20] * 25)),
    "maximum_mean_sentence": ({}, prose(*[90] * 7, 91), prose(*[90] * 8)),
    "maximum_ellipsis_share": (
        {},
        prose(*[40] * 15, between="\n").replace("。", "…", 4),
        prose(*[40] * 15, between="\n").replace("。", "…", 3),
    ),
    "maximum_duplicate_paragraphs": (
        {},
        "\n".join([prose(40, 40, 40, seed=n) for n in range(7)] + [short_line] * 5),
        "\n".join([prose(40, 40, 40, seed=n) for n in range(7)] + [short_line] * 4),
    ),
    "maximum_duplicate_paragraph_characters": (
        {"maximum_duplicate_sentence_characters": None},
        prose(*[27] * 19, between="\n") + f"\n{copy}" * 8,
        prose(*[30] * 19, between="\n") + f"\n{copy}" * 8,
    ),
    "maximum_duplicate_sentences": (
        {},
        prose(*[40] * 12) + short_sentence * 7,
        prose(*[40] * 13) + short_sentence * 7,
    ),
    "maximum_duplicate_sentence_characters": (
        {},
        prose(*[27] * 19) + copy * 8,
        prose(*[29] * 18, 18) + copy * 8,
    ),
    tops[2]: ({}, framed("いろ", 121, 605), framed("いろ", 120, 605)),
    tops[3]: ({}, framed("いろは", 109, 605), framed("いろは", 108, 605)),
    tops[4]: ({"minimum_zlib_ratio": None}, framed("いろはに", 97, 605), framed("いろはに", 96, 605)),
    "minimum_zlib_ratio": (
        {},
        cut(letters(1500, 1, "あかさたなは")),
        cut(letters(1500, 1, KANA, KANJI)),
    ),
    "maximum_zlib_ratio": (
        {"maximum_zlib_ratio": 0.5},
        cut(letters(700, 1, KANA, [chr(code) for code in range(0x4E00, 0x9F00)])),
        cut(letters(700, 1, KANA, KANJI[:100])),
    ),
}
CASES |= {
    f"maximum_{name}_words": ({}, with_words(name, WEB[f"maximum_{name}_words"] + 1), with_words(name, most))
    for name in ("advertisement", "adult", "discrimination", "violence")
    for most in [WEB[f"maximum_{name}_words"]]
}
CASES |= {
    f"maximum_duplicate_{n}grams": (
        {f"maximum_duplicate_{longer}grams": None for longer in range(n + 1, 11)},
        *repeated_just_too_often(n),
    )
    for n in range(5, 11)
}
REASONS = {
    "minimum_characters": "short",
    "minimum_japanese_characters": "few Japanese characters",
    "minimum_japanese_share": "not Japanese",
    "minimum_hiragana_share": "few hiragana",
    "maximum_katakana_share": "much katakana",
    "maximum_sentence": "long sentence",
    "minimum_mean_sentence": "short sentences",
    "maximum_mean_sentence": "long sentences",
    "maximum_ellipsis_share": "ellipses",
    "maximum_duplicate_paragraphs": "duplicate paragraphs",
    "maximum_duplicate_paragraph_characters": "duplicate paragraph characters",
    "maximum_duplicate_sentences": "duplicate sentences",
    "maximum_duplicate_sentence_characters": "duplicate sentence characters",
    **{f"maximum_top_{n}gram": f"frequent {n}-gram" for n in (2, 3, 4)},
    **{f"maximum_duplicate_{n}grams": f"repeated {n}-grams" for n in range(5, 11)},
    "maximum_advertisement_words": "advertisement words",
    "maximum_adult_words": "adult words",
    "maximum_discrimination_words": "discrimination words",
    "maximum_violence_words": "violence words",
    "minimum_zlib_ratio": "zlib ratio low",
    "maximum_zlib_ratio": "zlib ratio high",
}


@pytest.mark.parametrize("rule", WEB)
def test_each_rule_alone(rule):
    changes, bad, good = CASES[rule]
    assert make_rules("web", changes)(bad) == REASONS[rule]
    assert make_rules("web", changes | {rule: None})(bad) == ""  # so no other rule rejects it
    assert make_rules("web", changes)(good) == ""


def test_thresholds_of_the_papers():
    """Swallow v1 (arXiv:2404.17733) and LLM-jp (arXiv:2407.03963)."""
    shares = [WEB[f"maximum_top_{n}gram"] for n in (2, 3, 4)]
    shares += [WEB[f"maximum_duplicate_{n}grams"] for n in range(5, 11)]
    assert shares == [0.20, 0.18, 0.16, 0.15, 0.14, 0.13, 0.12, 0.11, 0.10]
    assert [WEB[f"{end}_zlib_ratio"] for end in ("minimum", "maximum")] == [0.30, 0.70]
    assert [WEB[f"{end}_mean_sentence"] for end in ("minimum", "maximum")] == [20, 90]


@pytest.mark.parametrize("kind", ["encyclopaedia", "books"])
def test_books_and_articles_need_only_length_and_japanese(kind):
    dialogue = "「そう」\n「ええ」\n" * 20
    assert make_rules("web", {})(dialogue) != "" and make_rules(kind, {})(dialogue) == ""
    assert make_rules(kind, {})(dialogue[:99]) == "short"
    assert make_rules(kind, {})("Not a word of it. " * 10) == "not Japanese"
    assert set(RULES[kind]) == set(WEB)


def test_without_a_set_only_the_changes_apply():
    assert make_rules(None, {})("") == ""
    assert make_rules(None, {"minimum_characters": 2})("a") == "short"


@pytest.mark.parametrize("rule", WEB)
@pytest.mark.parametrize("text", ["", "。", "あ", "\n", "あいうえお", "𠮷"])
def test_tiny_texts_raise_nothing(rule, text):
    make_rules(None, {rule: WEB[rule]})(text)


@pytest.mark.parametrize("n", range(2, 11))
def test_ngrams_against_counting_one_by_one(n):
    """A share exceeds a threshold just below it, and not a threshold equal to it."""
    generator = random.Random(n)
    for size, alphabet in [(8, "あい"), (60, "あい"), (400, "あいう"), (600, KANA), (500, "a𠮷"), (11, "あ")]:
        for _ in range(8):
            text = "".join(generator.choices(alphabet, k=size))
            text += text[: generator.randrange(size)]
            if n < 5:
                share, exceeds = top_share(text, n), Statistics(text).top_ngram_exceeds
            elif len(text) < n:
                continue
            else:
                share, exceeds = duplicate_share(text, n), Statistics(text).duplicate_ngrams_exceed
            assert not exceeds(n, share)
            assert share == 0 or exceeds(n, share - 1e-9)


def test_letters_against_a_plain_expression():
    """The table of kinds agrees with the regular expressions, for every character."""
    plane = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x10000)))) + "𠮷😀"
    text = Statistics(plane)
    assert text.japanese == len(
        re.findall(r"[\u3041-\u309f\u30a1-\u30ff\u3400-\u4dbf\u4e00-\u9fff々〆〇]", plane)
    )
    assert text.kinds[1] == len(re.findall(r"\s", plane))
    assert sum(text.kinds) == len(plane)
    assert japanese_share("ab 漢か\n") == 0.5 and japanese_share(" ") == 0.0


@pytest.mark.parametrize("name", ["advertisement", "adult", "discrimination", "violence"])
def test_words_are_counted_as_hojichar_finds_them(name):
    """Every word of the list alone, at the start, the end and the middle of a text."""
    path = importlib.resources.files("hojichar") / f"dict/{name}_keywords_ja.txt"
    words = [line.strip() for line in path.read_text("utf-8").split("\n") if line.strip()]
    for found in words:
        for text in (found, f"{found}。", f"。{found}", f"。{found}。"):
            assert Statistics(text).words_exceed(name, 0), found
    assert not Statistics("静かな朝の散歩。").words_exceed(name, 0)
    assert Statistics("。".join(words)).words_exceed(name, len(words) - 1)
    assert not Statistics("。".join(words)).words_exceed(name, len(words))


def test_a_katakana_word_inside_another_word_does_not_count():
    path = importlib.resources.files("hojichar") / "dict/violence_keywords_ja.txt"
    found = next(line for line in path.read_text("utf-8").split("\n") if re.fullmatch("[ァ-ヴー]+", line))
    assert Statistics(f"その{found}は").words_exceed("violence", 0)
    assert not Statistics(f"そのネ{found}は").words_exceed("violence", 0)
    assert not Statistics(f"その{found}ネは").words_exceed("violence", 0)


def test_zlib_ratio_is_that_of_the_utf8_bytes():
    text = prose(*[40] * 20)
    assert Statistics(text).zlib_ratio == len(zlib.compress(text.encode(), 9)) / len(text.encode())


def test_sentences():
    text = Statistics("一。二！？三\n四…\n。五")
    assert text.sentences == ["一。", "二！", "三", "四…", "五"]
    assert text.ellipsis_share == 0.2 and text.mean_sentence == 1.6


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("wep", {}, "unknown set of rules \"wep\". Did you mean 'web'?"),
        (["web"], {}, "unknown set of rules"),
        ("web", [], "expected an object"),
        ("web", {"minimum_charcters": 3}, "unknown rule (value 3). Did you mean 'minimum_characters'?"),
        ("books", {"minimum_characters": 2.5}, "minimum_characters: 2.5, expected a whole number"),
        ("web", {"minimum_characters": True}, "minimum_characters: true, expected a whole number"),
        ("web", {"minimum_zlib_ratio": "0.3"}, 'minimum_zlib_ratio: "0.3", expected a number'),
        ("web", {"minimum_zlib_ratio": -0.1}, "-0.1, expected a number of 0 or more, or null"),
    ],
)
def test_a_wrong_configuration_is_refused(kind, changes, message):
    with pytest.raises(Refused, match=r"^dataset\.json: ") as refusal:
        check_rules(kind, changes, "dataset.json: rules")
    assert message in str(refusal.value)


def test_a_valid_configuration_is_accepted():
    for kind, rules in RULES.items():
        check_rules(kind, rules, "")
    check_rules("web", {"maximum_adult_words": None, "minimum_mean_sentence": 15}, "")


def test_checking_imports_nothing_heavy():
    code = (
        "import sys, recipe.corpus.rules as r; r.check_rules('web', {}, ''); sys.exit('numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
