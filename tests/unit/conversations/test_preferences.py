"""Preferences: the forms of rows, what is dropped, and the ids that are trained."""

import json
from collections import Counter

import pytest
from conftest import sentences
from recipe.config.chat_templates import chat_template
from recipe.conversations import preferences
from recipe.conversations.encode import encode_conversation
from recipe.project import RecipeError
from recipe.tokenization.train import train_tokenizer

QUESTION = {"role": "user", "content": "山は?"}


def answer(text):
    return {"role": "assistant", "content": text}


def load(tmp_path, rows, normalize=str, valid_share=0.5, figures=None):
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    entry = {"pairs": {"mine": {"path": str(tmp_path / "p.jsonl")}}, "valid_share": valid_share}
    return preferences.load_preferences(entry, normalize, figures)


# Enough different questions that neither side of the split is empty.
FILL = [{"prompt": f"{i}?", "chosen": "良", "rejected": "悪"} for i in range(20)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "山は?", "chosen": "高い", "rejected": "低い"},
        {"prompt": [QUESTION], "chosen": [answer("高い")], "rejected": [answer("低い")]},
        {"chosen": [QUESTION, answer("高い")], "rejected": [QUESTION, answer("低い")]},
        {"prompt": "山は?", "chosen": [QUESTION, answer("高い")], "rejected": [QUESTION, answer("低い")]},
        {"prompt": " 山は?\n", "chosen": [QUESTION, answer("高い")], "rejected": "低い"},
    ],
    ids=["texts", "messages", "implicit prompt", "prompt repeated", "repeated in one, with white space"],
)
def test_forms(tmp_path, row):
    assert kept(tmp_path, row) == [preferences.Preference([QUESTION], "高い", "低い")]


def kept(tmp_path, row):
    """What becomes of one row, with preferences enough for both sides."""
    sides, _ = load(tmp_path, [row, *FILL], str.strip)
    return [p for p in sides["train"] + sides["valid"] if p.chosen == "高い"]


SYSTEM = {"role": "system", "content": "短く"}
BEFORE = [{"role": "user", "content": "海は?"}, answer("深い")]


def both(*before):
    return {"chosen": [*before, answer("高い")], "rejected": [*before, answer("低い")]}


@pytest.mark.parametrize(
    "row",
    [
        {"system": "短く", "prompt": "山は?", "chosen": "高い", "rejected": "低い"},
        {"prompt": "山は? ", **both(SYSTEM, QUESTION)},
        {"prompt": [SYSTEM, QUESTION], **both(QUESTION)},
        {"prompt": [SYSTEM, QUESTION], **both(SYSTEM, QUESTION)},
        {"system": "短く", **both(SYSTEM, QUESTION)},
        {"prompt": "山は?", **both(SYSTEM)},
    ],
    ids=["column", "behind it", "prompt", "both", "column and message", "answers"],
)
def test_a_system_message_is_kept_once(tmp_path, row):
    assert kept(tmp_path, row) == [preferences.Preference([SYSTEM, QUESTION], "高い", "低い")]


@pytest.mark.parametrize(
    "row",
    [
        {"history": [["海は?", "深い"]], "prompt": "山は?", "chosen": "高い", "rejected": "低い"},
        {"prompt": "山は?", **both(*BEFORE, QUESTION)},
        {"prompt": [*BEFORE, QUESTION], **both(QUESTION)},
        {"prompt": "海は?", **both(*BEFORE, QUESTION)},
        {"history": [["海は?", "深い"]], "prompt": "山は?", **both(*BEFORE, QUESTION)},
    ],
    ids=["column", "prompt at the end", "end of the prompt", "prompt at the beginning", "column and answers"],
)
def test_the_history_is_kept_once(tmp_path, row):
    assert kept(tmp_path, row) == [preferences.Preference([*BEFORE, QUESTION], "高い", "低い")]


def test_marks_and_columns_of_preferences(tmp_path):
    """Only the last answers are compared: a mark of an answer before them has no effect."""
    marked = both(BEFORE[0], BEFORE[1] | {"weight": 0}, QUESTION)
    assert kept(tmp_path, marked) == [preferences.Preference([*BEFORE, QUESTION], "高い", "低い")]
    rows = [
        {"prompt": "山は?", "chosen": "高い", "rejected": "低い", "weight": 0},
        {"prompt": "山は?", "chosen": [answer("高い") | {"train": False}], "rejected": "低い", "score": 3},
        both(SYSTEM, {"role": "system", "content": "長く"}, QUESTION),
    ]
    _, funnel = load(tmp_path, [*rows, *FILL])
    assert funnel["mine"]["dropped"] == {"answer not trained": 2, "two system messages": 1}
    assert "| mine | 23 | 20 | answer not trained 2, two" in preferences.preferences_table(funnel)
    assert "- mine: `score` 1\n" in preferences.preferences_table(funnel)
    figures = Counter({"characters composed": 3, "invisible characters removed": 0})
    _, funnel = load(tmp_path, FILL, figures=figures)
    assert "Found in mine: characters composed 3.\n" in preferences.preferences_table(funnel) and not figures
    with pytest.raises(RecipeError, match=r"line 1: tools: .*expected no value"):
        load(tmp_path, [FILL[0] | {"tools": "[1]"}])


def test_every_row_is_kept_or_counted_as_dropped(tmp_path):
    rows = [
        *FILL,
        FILL[0],
        {"prompt": "a", "chosen": "同じ ", "rejected": "同じ"},
        {"prompt": "a", "chosen": " ", "rejected": "低い"},
        {
            "chosen": [QUESTION, answer("高い")],
            "rejected": [{"role": "user", "content": "海は?"}, answer("深い")],
        },
    ]
    sides, funnel = load(tmp_path, rows, str.strip)
    assert funnel["mine"] == {
        "in": 24,
        "out": 20,
        "dropped": {
            "duplicate": 1,
            "chosen equals rejected": 1,
            "blank output": 1,
            "chosen and rejected answer different questions": 1,
        },
    }
    assert len(sides["train"]) + len(sides["valid"]) == 20


def test_errors_are_named(tmp_path):
    with pytest.raises(RecipeError, match=r"line 1: no column 'rejected'; it has \['chosen', 'prompt'\]"):
        load(tmp_path, [{"prompt": "x", "chosen": "y"}])
    with pytest.raises(
        RecipeError, match=r"line 1: no column 'prompt', and chosen is not a whole conversation"
    ):
        load(tmp_path, [{"chosen": "x", "rejected": "y"}])
    with pytest.raises(RecipeError, match=r"no preferences on the valid side"):
        load(tmp_path, FILL[:1], valid_share=1e-9)


def test_ids_are_the_prompt_and_the_answers_with_their_end():
    fast = train_tokenizer(sentences(2000, 1), {"vocab_size": 400}).tokenizer
    fast.chat_template = chat_template("chat")

    def encode(messages):
        return encode_conversation(fast, messages)[0]

    preference = preferences.Preference([QUESTION], "</s>高い", "低い山")
    (row,) = preferences.encode_preferences([preference], encode, 256)
    assert fast.decode(row["prompt_ids"]) == "<s>User:\n山は?\n\nAssistant:\n"
    assert row["chosen_ids"].count(fast.eos_token_id) == row["rejected_ids"].count(fast.eos_token_id) == 1
    assert (
        fast.decode(row["chosen_ids"]) == "</s>高い</s>" and fast.decode(row["rejected_ids"]) == "低い山</s>"
    )
    size = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    assert not list(preferences.encode_preferences([preference], encode, size - 1))
    assert list(preferences.encode_preferences([preference], encode, size)) == [row]
