"""Questions for training by rewards: what is read, dropped and counted, and what does not fit."""

import json

import pytest
from recipe.conversations import questions
from recipe.conversations.instructions import Pair, identity, messages_of
from recipe.conversations.questions import Question, encode_questions, load_questions
from recipe.corpus.splitting import text_hash
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


def test_packaged_questions_are_normalised_as_the_pretraining_text(tmp_path, monkeypatch):
    (tmp_path / "tatoeba").mkdir()
    (tmp_path / "tatoeba/SENTENCES").touch()
    monkeypatch.setattr(questions, "DATA", tmp_path)

    def read_pairs(name, spec, normalize, *_):
        return [Pair(f"{i}?", normalize("山 は"), "", name, str(i)) for i in range(20)]

    monkeypatch.setattr(questions, "read_pairs", read_pairs)
    sides, _ = load(tmp_path, FILL, pairs={"translation": {"source": "tatoeba"}})
    asked = [question.messages[0]["content"] for question in sides["train"] + sides["valid"]]
    assert len(asked) == 20 and all("山は" in text for text in asked)


def encode(messages):
    return list(range(len(messages[0]["content"])))


def test_questions_that_leave_no_room_are_left_out():
    asked = [Question([user("あ" * size)], "い") for size in (3, 4, 5)]
    rows, left_out = encode_questions(asked, encode, 4, 0, epochs=1)
    short = [{"prompt": [0, 1, 2], "answer": "い"}, {"prompt": [0, 1, 2, 3], "answer": "い"}]
    assert sorted(rows, key=lambda row: len(row["prompt"])) == short
    assert left_out == {"question too long": 1, "not asked": 0}
    # A training whose questions are all too long ends, too.
    assert encode_questions(asked, encode, 2, 0, count=9)[0] == []


def test_the_order_is_that_of_seed_and_epoch_and_no_more_questions_are_encoded_than_are_asked():
    asked = [Question([user("あ" * size)], str(size)) for size in range(1, 9)]
    seen = []

    def noted(messages):
        seen.append(len(messages[0]["content"]))
        return encode(messages)

    rows, left_out = encode_questions(asked, noted, 6, 1, count=3)
    assert len(rows) == 3 and len(seen) == len(set(seen)) < 8
    assert left_out == {"question too long": len(seen) - 3, "not asked": 8 - len(seen)}
    longer, _ = encode_questions(asked, encode, 6, 1, count=18)
    assert longer[:3] == rows  # a training that is made longer goes on with the questions that follow
    epochs = [[row["answer"] for row in longer[start : start + 6]] for start in (0, 6, 12)]
    assert [sorted(epoch) for epoch in epochs] == [["1", "2", "3", "4", "5", "6"]] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert encode_questions(asked, encode, 6, 2, count=18)[0] != longer


def test_the_identity_is_the_hash_of_all_messages():
    """It decides which pairs are kept, so it may never change."""
    history = (user("山は?"), {"role": "assistant", "content": "高い", "trained": False})
    pair = Pair("訳せ", "海", "sea", "mine", "山は?", history)
    texts = [message["content"] for message in messages_of(pair._asdict())]
    assert identity(pair) == text_hash("\0".join(texts)) and len(texts) == 4
