"""Columns of rows: what was said before, answers that are not trained, what is not used, what is refused."""

import json
import math
from collections import Counter

import pytest
from recipe.conversations.instructions import messages_of, pairs_table, read_pairs, reason_to_drop
from recipe.project import RecipeError

SYSTEM = {"role": "system", "content": "丁寧に"}
ALPACA = {"instruction": "海は?", "input": "", "output": "深い"}


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


CHAT = {"messages": turns("海は?", "深い")}
SHAREGPT = {"conversations": [{"from": "human", "value": "海は?"}, {"from": "gpt", "value": "深い"}]}
ROLES = {"conversations": turns("海は?", "深い")}  # as in llm-jp/magpie-sft-v1.0


def read(tmp_path, *rows):
    """The pairs of rows, and the columns that were not used."""
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    unused = Counter()
    return list(read_pairs("mine", {"path": str(tmp_path / "a.jsonl")}, str, unused)), unused


def conversation(tmp_path, row):
    ((pair,), unused) = read(tmp_path, row)
    assert not unused and not reason_to_drop(pair, False)
    return messages_of(pair._asdict())


@pytest.mark.parametrize(
    "row", [ALPACA, CHAT, SHAREGPT, ROLES], ids=["alpaca", "messages", "sharegpt", "roles"]
)
@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "history",
    [
        [["山は?", "高い"]],
        turns("山は?", "高い"),
        [{"from": "human", "value": "山は?"}, {"from": "gpt", "value": "高い"}],
    ],
    ids=["lists", "messages", "sharegpt"],
)
def test_the_system_message_and_the_history_come_first(tmp_path, row, column, history):
    found = conversation(tmp_path, row | {column: "丁寧に", "history": history})
    assert found == [SYSTEM, *turns("山は?", "高い", "海は?", "深い")]


@pytest.mark.parametrize("nothing", [None, "", math.nan, [], "[]"])
def test_columns_without_a_value_say_nothing(tmp_path, nothing):
    row = ALPACA | {"system": None, "history": nothing, "tools": nothing, "images": nothing, "id": nothing}
    assert conversation(tmp_path, row) == turns("海は?", "深い")


def test_a_system_column_and_a_system_message(tmp_path):
    row = {"messages": [SYSTEM, *turns("海は?", "深い")], "history": [["山は?", "高い"]]}
    expected = [SYSTEM, *turns("山は?", "高い", "海は?", "深い")]
    assert conversation(tmp_path, row) == conversation(tmp_path, row | {"system": "丁寧に"}) == expected
    ((other,), _) = read(tmp_path, row | {"system": "短く"})
    assert other.dropped == "two system messages"


def test_a_blank_system_message_is_none(tmp_path):
    row = {"messages": [SYSTEM | {"content": " "}, *turns("海は?", "深い")]}
    assert conversation(tmp_path, row) == turns("海は?", "深い")
    assert conversation(tmp_path, row | {"system": "丁寧に"}) == [SYSTEM, *turns("海は?", "深い")]


def test_columns_that_are_not_used_are_listed(tmp_path):
    chat = {"messages": [m | {"name": "x"} for m in CHAT["messages"]], "id": 3, "output": "浅い"}
    _, unused = read(tmp_path, ALPACA | {"id": 1, "category": "海"}, ALPACA | {"category": None}, chat)
    assert unused == {"id": 2, "category": 1, "messages[].name": 1, "output": 1}
    funnel = {"mine": {"in": 3, "out": 3, "dropped": {}, "unused_columns": dict(unused)}}
    config = {"instruction": {"pairs": {"mine": {"path": "a.jsonl"}}}}
    table = pairs_table(funnel, config, {"train": 0, "valid": 0})
    assert "- mine: `id` 2, `category` 1, `output` 1, `messages[].name` 1\n" in table
    assert "not used" not in pairs_table({"mine": {"in": 3, "out": 3, "dropped": {}}}, config, {})


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (ALPACA | {"tools": '[{"name": "f"}]'}, r"line 1: tools: .*expected no value"),
        (SHAREGPT | {"images": ["a.png"]}, r"line 1: images: .*a\.png.*expected no value"),
        (
            {"messages": [*turns("海は?"), {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]},
            r"line 1: messages: message 2: tool_calls: .*expected no value",
        ),
        (ALPACA | {"history": "山は?"}, r"line 1: history: entry 1: '山は\?', expected \[question, answer\]"),
        (ALPACA | {"history": [["山は?"]]}, r"line 1: history: entry 1: \['山は\?'\], expected"),
        (ALPACA | {"history": [["山は?", 3]]}, "line 1: history: entry 1: assistant: int, expected a string"),
        (ALPACA | {"system": ["丁寧に"]}, "line 1: system: list, expected a string"),
        (ALPACA | {"weight": 0.5}, "line 1: weight: 0.5, expected 0 or 1"),
        (ALPACA | {"train": "no"}, "line 1: train: 'no', expected 0 or 1"),
        (CHAT | {"loss_mask": [1]}, "line 1: loss_mask: 1 values for 2 messages"),
    ],
)
def test_values_that_are_not_supported_are_refused_by_line(tmp_path, row, error):
    with pytest.raises(RecipeError, match=error):
        read(tmp_path, row)


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss_mask": 0}]
)
def test_an_answer_that_is_not_trained_is_context(tmp_path, mark):
    first, second, *rest = turns("山は?", "低い", "違います", "高い")
    found = conversation(tmp_path, {"messages": [first, second | mark, *rest]})
    assert found == [first, second | {"trained": False}, *rest]


def test_a_mask_of_a_row_has_a_value_for_each_message(tmp_path):
    first, second, *rest = turns("山は?", "低い", "違います", "高い")
    found = conversation(tmp_path, {"messages": [first, second, *rest], "loss_mask": [0, 0, 0, 1]})
    assert found == [first, second | {"trained": False}, *rest]


@pytest.mark.parametrize(
    "row", [ALPACA, CHAT, SHAREGPT, ROLES], ids=["alpaca", "messages", "sharegpt", "roles"]
)
def test_a_row_without_a_trained_answer_is_dropped(tmp_path, row):
    pairs, _ = read(tmp_path, row | {"weight": 0}, row | {"weight": 1}, row | {"train": None})
    assert [pair.dropped for pair in pairs] == ["no trained answer", "", ""]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss_mask": 0}])
def test_a_mark_of_a_row_is_for_the_answers_of_its_history_too(tmp_path, mark):
    ((pair,), _) = read(tmp_path, ALPACA | {"history": [["山は?", "高い"]]} | mark)
    assert pair.dropped == "no trained answer"
    mask = CHAT | {"history": [["山は?", "高い"]], "loss_mask": [0, 1]}
    assert conversation(tmp_path, mask) == turns("山は?", "高い", "海は?", "深い")


def test_a_history_that_the_messages_repeat_is_there_once(tmp_path):
    whole = turns("山は?", "高い", "海は?", "深い")
    row = {"messages": [SYSTEM, *whole], "history": [["山は? ", "高い"]]}
    assert conversation(tmp_path, row) == [SYSTEM, *whole]


def test_what_follows_the_last_trained_answer_is_cut(tmp_path):
    *before, last = turns("山は?", "高い", "海は?", "浅い")
    assert conversation(tmp_path, {"messages": [*before, last | {"weight": 0}]}) == turns("山は?", "高い")
