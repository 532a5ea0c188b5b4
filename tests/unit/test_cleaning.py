"""Cleaning: what is normalised, what is dropped and why; every byte is accounted for."""

import pytest
from recipe.cleaning import Funnel, clean, is_valid_side, make_normalizer, text_hash
from recipe.rules import japanese_share
from recipe.sources import Document

CONFIG = {
    "sources": {"a": {"source": "files"}, "b": {"source": "files", "held_out": True}},
    "minimum_characters": 5,
    "minimum_japanese_share": 0.3,
    "valid_share": 0.05,
}


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ("営業は10〜20時", "営業は10〜20時"),
        ("営業は10～20時", "営業は10〜20時"),  # the full-width tilde becomes the wave dash
        ("~/.bashrc を読む", "~/.bashrcを読む"),
        ("ﾊﾝｶｸ　全角ＡＢＣ", "ハンカク全角ABC"),
        ("一行目\n \n三行目", "一行目\n三行目"),  # an empty line ends nothing
    ],
)
def test_normalizer(raw, wanted):
    assert make_normalizer({})(raw) == wanted


def test_wave_dash_can_be_given_up():
    assert make_normalizer({"keep_wave_dash": False})("10〜20時") == "1020時"


def run(documents, source="a"):
    funnel = Funnel()
    kept = list(clean(documents, source, CONFIG, set(), funnel))
    return kept, funnel


def test_every_document_and_byte_is_accounted_for():
    documents = [
        Document("1", "これは日本語の文章です。"),
        Document("2", "これは　日本語の文章です。"),  # the same after normalising
        Document("3", "This is English text."),
        Document("4", "短い"),
        Document("5", " "),
        Document("6", "制御\x00文字を含む日本語"),
        Document("7", "片方だけ\ud800のサロゲート"),
        Document("8", "別のページを見よ", "redirect"),
        Document("9", "もう一つの   日本語の文章です。\n\n続き。"),
    ]
    kept, funnel = run(documents)
    table = funnel.as_json()
    assert table["documents"]["in"] == 9
    assert table["documents"]["out"] == len(kept) == 2
    assert table["documents"]["dropped"] == {
        "duplicate": 1,
        "not Japanese": 1,
        "short": 1,
        "empty": 1,
        "control characters": 2,
        "redirect": 1,
    }
    size = table["bytes"]
    assert size["in"] == size["out"] + sum(size["dropped"].values()) + size["trimmed"]
    assert size["trimmed"] > 0


def test_split_is_by_hash_and_near_its_share():
    kept, _ = run([Document(str(i), f"これは{i}番の日本語の文です。") for i in range(4000)])
    share = sum(document.valid for document in kept) / len(kept)
    assert 0.04 < share < 0.06
    # Stable: more data moves no document to the other side.
    more, _ = run([Document(str(i), f"これは{i}番の日本語の文です。") for i in range(8000)])
    sides = {document.id: document.valid for document in more}
    assert all(sides[document.id] == document.valid for document in kept)


def test_held_out_source_is_all_validation():
    kept, _ = run([Document(str(i), f"これは{i}番の日本語の文です。") for i in range(50)], "b")
    assert len(kept) == 50 and all(document.valid for document in kept)


def test_duplicates_are_found_across_sources():
    seen: set[bytes] = set()
    text = [Document("1", "これは日本語の文章です。")]
    assert len(list(clean(text, "a", CONFIG, seen, Funnel()))) == 1
    assert len(list(clean(text, "b", CONFIG, seen, Funnel()))) == 0


def test_japanese_share_counts_letters_over_solid_characters():
    assert japanese_share("ab 漢か") == 0.5
    assert japanese_share("") == 0.0


def test_share_of_one_side():
    assert is_valid_side(text_hash("x"), 1.0) and not is_valid_side(text_hash("x"), 0.0)
