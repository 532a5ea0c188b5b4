"""Preferences: the forms of rows, what is dropped, and the ids that are trained."""

import json

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


def load(tmp_path, rows, normalize=str, valid_share=0.5):
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    entry = {"pairs": {"mine": {"path": str(tmp_path / "p.jsonl")}}, "valid_share": valid_share}
    return preferences.load_preferences(entry, normalize)


# Enough different questions that neither side of the split is empty.
FILL = [{"prompt": f"{i}?", "chosen": "良", "rejected": "悪"} for i in range(20)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "山は?", "chosen": "高い", "rejected": "低い"},
        {"prompt": [QUESTION], "chosen": [answer("高い")], "rejected": [answer("低い")]},
        {"chosen": [QUESTION, answer("高い")], "rejected": [QUESTION, answer("低い")]},
        {"prompt": "山は?", "chosen": [QUESTION, answer("高い")], "rejected": [QUESTION, answer("低い")]},
    ],
    ids=["texts", "messages", "implicit prompt", "prompt repeated"],
)
def test_forms(tmp_path, row):
    sides, _ = load(tmp_path, [row, *FILL])
    found = [p for p in sides["train"] + sides["valid"] if p.chosen == "高い"]
    assert found == [preferences.Preference([QUESTION], "高い", "低い")]


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
    sides, funnel = load(tmp_path, rows)
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
