"""Stages 11 and 12 with faulty pairs: faults are counted, and no question is on two sides."""

import json
from collections import Counter

import pyarrow.parquet as pq
import pytest
from conftest import sentences

GROUPS, REPLIES = 40, 3


@pytest.fixture(scope="module")
def data(project):
    """The recipe `flawed`: mini with pairs that have every kind of fault, run to stage 12."""
    texts = sentences(GROUPS * REPLIES, 7)
    # Conversations that begin with the same question are a group, which must stay on one side.
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i % GROUPS}番の話をして"},
                {"role": "assistant", "content": text},
                {"role": "user", "content": "もう一度。"},
                {"role": "assistant", "content": "はい。"},
            ]
        }
        for i, text in enumerate(texts)
    ]
    rows += rows[:3]
    rows += [{"instruction": f"空白{i}", "input": "", "output": blank} for i, blank in enumerate(("", " \n"))]
    rows.append({"instruction": "長い答えは?", "input": "", "output": "".join(sentences(40, 8))})
    shared = shared_sentence(project)
    rows.append({"instruction": "次の文を直して", "input": shared, "output": "直しました。"})
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (project.folder / "flawed.jsonl").write_text("\ufeff" + lines, "utf-8")
    project.copy("flawed")
    project.edit("flawed", "instruction", pairs={"mine": {"path": "flawed.jsonl"}})
    result = project.run("run_all.sh", "--recipe", "flawed", "--to", "12")
    return project, result.stdout


def shared_sentence(project):
    """A sentence of the validation side that mini is measured on."""
    (shard,) = project.output("mini", "02_dataset", ".").glob("valid-text-*.parquet")
    return pq.read_table(shard)["text"][0].as_py().split("\n")[0]


def sides(project):
    folder = project.output("flawed", "11_dataset", ".")
    return {side: pq.read_table(folder / f"{side}.parquet").to_pylist() for side in ("train", "valid")}


def test_every_fault_is_counted(data):
    project, output = data
    counts = project.figures("flawed", "11_dataset")["pairs"]["mine"]
    assert counts == {
        "in": GROUPS * REPLIES + 7,
        "out": GROUPS * REPLIES + 2,
        "dropped": {"duplicate": 3, "blank output": 2},
        "byte_order_marks": 1,
    }
    assert sum(map(len, sides(project).values())) == counts["out"]
    assert "byte order marks removed from 1 files" in output


def test_a_pair_longer_than_the_context_is_left_out_and_counted(data):
    project, output = data
    left_out = project.figures("flawed", "12_finetune")["left_out"]
    assert sorted(counts["longer than block_size"] for counts in left_out.values()) == [0, 1]
    assert "left out: longer than block_size " in output


def test_conversations_with_one_first_question_are_on_one_side(data):
    project, _ = data
    found = sides(project)
    questions = {side: Counter(row["headword"] for row in rows) for side, rows in found.items()}
    assert not questions["train"].keys() & questions["valid"].keys()
    groups = [count for side in questions.values() for name, count in side.items() if "番の話" in name]
    assert groups == [REPLIES] * GROUPS
    assert 0.05 < len(found["valid"]) / sum(map(len, found.values())) < 0.4


def test_overlap_with_pretraining_validation_text_is_reported(data):
    project, output = data
    assert sum(project.figures("flawed", "11_dataset")["pretraining_overlap"].values()) == 1
    assert "pairs that share a sentence with the validation text of pretraining (they are kept): " in output


def test_a_held_out_conversation_is_asked_with_all_its_turns(data):
    project, _ = data
    project.run("run_all.sh", "--recipe", "flawed", "--from", "15", "--to", "15")
    answers = json.loads(project.output("flawed", "15_generate", "answers.json").read_text())
    turns = {
        (row["headword"], row["history"][1]["content"]) for row in sides(project)["valid"] if row["history"]
    }
    shown = [tuple(row["prompt"].split(" → ")) for row in answers if row["prompt"].endswith(" → もう一度。")]
    assert shown and {(question, answer) for question, answer, _ in shown} <= turns
