"""Questions for training by rewards: what is read, dropped and counted, and what does not fit."""

import json

import pytest
from recipe.conversations import questions
from recipe.conversations.questions import Question, encode_questions, load_questions
from recipe.project import RecipeError

FILL = [{"instruction": f"{i}?", "output": "はい"} for i in range(20)]  # neither side of the split is empty


def load(tmp_path, rows, **changes):
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    values = {"pairs": {"mine": {"path": str(tmp_path / "q.jsonl")}}, "valid_share": 0.5}
    return load_questions(values | {"rewards": {"length": {}}} | changes, {})


def user(text):
    return {"role": "user", "content": text}


def test_the_forms_of_pairs_are_questions_with_an_expected_answer(tmp_path):
    rows = [
        {"system": "短く", "instruction": "山は?", "output": " 高い\n"},
        {"messages": [user("海は?"), {"role": "assistant", "content": "深い"}]},
    ]
    sides, funnel = load(tmp_path, rows + FILL)
    found = sides["train"] + sides["valid"]
    assert Question([{"role": "system", "content": "短く"}, user("山は?")], " 高い") in found
    assert Question([user("海は?")], "深い") in found
    assert funnel["mine"] == {"in": 22, "out": 22, "dropped": {}}


def test_what_is_dropped_is_counted(tmp_path):
    blank, other = {"instruction": "空は?", "output": " "}, {"messages": [user("川は?")], "source": "x"}
    rows = [*FILL, FILL[0], blank, other]
    _, funnel = load(tmp_path, rows)
    assert funnel["mine"]["dropped"] == {"duplicate": 1, "no answer": 1}
    assert (funnel["mine"]["in"], funnel["mine"]["out"]) == (23, 21)
    assert funnel["mine"]["unused_columns"] == {"source": 1}
    # Only a reward that compares with the answer needs one.
    _, funnel = load(tmp_path, rows, rewards={"length": {}, "answer": {}})
    assert funnel["mine"]["dropped"] == {"duplicate": 1, "no answer": 1, "blank output": 1}


def test_a_side_without_questions_is_named(tmp_path):
    with pytest.raises(RecipeError, match="no questions on the valid side.*'in': 1, 'out': 1"):
        load(tmp_path, FILL[:1], valid_share=1e-9)


def test_a_bad_row_is_named_with_the_file_of_the_recipe(tmp_path):
    with pytest.raises(RecipeError, match="preference.json: pairs.mine.path: .*matches no file"):
        load_questions({"pairs": {"mine": {"path": str(tmp_path / "no.jsonl")}}, "rewards": {}}, {})


def test_packaged_text_that_was_deleted_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "DATA", tmp_path)
    values = {"pairs": {"translation": {"source": "tatoeba"}}, "rewards": {}}
    with pytest.raises(RecipeError, match="pairs.translation.source: .*tatoeba has no files.*stage 01"):
        load_questions(values, {})


def test_questions_that_leave_no_room_are_left_out():
    asked = [Question([user("あ" * size)], "い") for size in (3, 4, 5)]
    rows = encode_questions(asked, lambda messages: list(range(len(messages[0]["content"]))), 4)
    assert rows == [{"prompt": [0, 1, 2], "answer": "い"}, {"prompt": [0, 1, 2, 3], "answer": "い"}]
