"""Cleaning one text: the text that is kept, or the reason to drop it."""

import pytest
from recipe.corpus.cleaning import make_cleaner
from recipe.corpus.rules import make_rules
from recipe.corpus.splitting import is_valid_side, text_hash

CONFIG = {"minimum_characters": 5, "minimum_japanese_share": 0.3}


@pytest.mark.parametrize(
    ("raw", "kept", "reason"),
    [
        ("これは　日本語の文章です。\n\n続き。", "これは日本語の文章です。\n続き。", ""),
        ("This is English text.", None, "not Japanese"),
        ("短い", None, "short"),
        (" \n\u3000", None, "empty"),
        ("制御\x00文字を含む日本語", None, "control characters"),
        ("片方だけ\ud800のサロゲート", None, "control characters"),
    ],
)
def test_kept_text_and_reason(raw, kept, reason):
    text, seen = make_cleaner(CONFIG, {"source": "files"})(raw)
    assert seen == reason
    assert kept is None or text == kept


def test_a_set_of_rules_can_only_raise_the_limits_of_the_dataset():
    text = "これは日本語の文章です。" * 5
    assert make_cleaner({}, {"rules": "books"})(text)[1] == "short"
    assert make_cleaner({"rules": {"books": {"minimum_characters": 50}}}, {"rules": "books"})(text)[1] == ""
    changed = {"rules": {"books": {"minimum_characters": 50}}, "minimum_characters": 70}
    assert make_cleaner(changed, {"rules": "books"})(text)[1] == "short"


def test_share_of_the_validation_side():
    assert is_valid_side(text_hash("x"), 1.0) and not is_valid_side(text_hash("x"), 0.0)


def test_rules_do_not_take_a_kept_layout_for_repetition():
    """The text of the set `web` is dropped for its indentation when the rules see it."""
    lines = [
        f"{i}番目の段落では、{'山川海空森'[i % 5]}について{i * 37}回も書いてあります。" for i in range(40)
    ]
    text = "\n\n".join("                    " + line for line in lines)
    kept, dropped = (
        make_cleaner(config, {"rules": "web"})(text)
        for config in ({"layout": "keep"}, {"layout": "neologdn"})
    )
    assert kept[0] == text and kept[1] == dropped[1]
    assert dropped[0].splitlines() == lines
    raw = make_rules("web", {})
    assert raw(text) != dropped[1]
