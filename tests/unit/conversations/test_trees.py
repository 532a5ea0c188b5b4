"""Trees of replies: which messages make a conversation, what is counted, and what is refused."""

import json
import math
from collections import Counter

import pytest
from recipe.conversations.instructions import messages_of, read_pairs
from recipe.project import RecipeError


def message(name, parent, role="assistant", text=None, rank=None):
    return {"message_id": name, "parent_id": parent, "role": role, "text_ja": text or name, "rank": rank}


def read(tmp_path, rows):
    """The kept conversations as texts, and the reasons for the others."""
    (tmp_path / "tree.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = list(read_pairs("mine", {"path": str(tmp_path / "tree.jsonl")}, str, Counter()))
    kept = [pair for pair in pairs if not pair.dropped]
    texts = [[m["content"] for m in messages_of(pair._asdict())] for pair in kept]
    return texts, Counter(pair.dropped for pair in pairs if pair.dropped)


def test_each_message_is_followed_by_its_best_reply(tmp_path):
    rows = [
        message("worse", "root", rank=1),
        message("root", None, "prompter"),
        message("unranked", "root", rank=math.nan),
        message("best", "root", rank=0),
        message("next", "best", "prompter"),
        message("last", "next"),
    ]
    assert read(tmp_path, rows) == ([["root", "best", "next", "last"]], {})


@pytest.mark.parametrize("parent", [None, math.nan, ""])
def test_a_first_message_has_no_parent(tmp_path, parent):
    rows = [message("a", parent, "prompter"), message("b", "a"), message("c", None, "prompter")]
    assert read(tmp_path, [*rows, message("d", "c")]) == ([["a", "b"], ["c", "d"]], {})


def test_ids_can_be_numbers_also_zero(tmp_path):
    rows = [message(0, math.nan, "prompter", "山は?"), message(1, 0.0, text="高い")]
    assert read(tmp_path, rows) == ([["山は?", "高い"]], {})


def test_a_missing_parent_is_counted_once_for_all_that_follows(tmp_path):
    whole = [message("a", None, "prompter"), message("b", "a")]
    orphans = [message("c", "gone", "prompter"), message("d", "c"), message("e", "lost")]
    assert read(tmp_path, orphans + whole) == ([["a", "b"]], {"parent missing": 2})


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (
            [message("a", None, "prompter"), message("b", "a"), message("b", "a")],
            r"line 3: message_id: 'b' is also the id of .*line 2",
        ),
        ([message("a", "a", "prompter")], "line 1: message_id 'a' is its own ancestor"),
        (
            [message("x", "b"), message("a", "b", "prompter"), message("b", "a")],
            "line 3: message_id 'b' is its own ancestor",
        ),
        ([message(None, None, "prompter")], "line 1: message_id: None, expected a text or a number"),
        ([message(["a"], None, "prompter")], r"line 1: message_id: \['a'\], expected a text or a number"),
        ([message("a", None, "prompter", rank="best")], "line 1: rank: 'best', expected a number"),
        ([message("a", None, "robot")], "line 1: role 'robot', expected one of"),
        ([message("a", None, ["user"])], r"line 1: role \['user'\], expected one of"),
    ],
    ids=["id twice", "own parent", "circle", "no id", "id a list", "rank", "role", "role a list"],
)
def test_a_broken_tree_is_refused_by_line(tmp_path, rows, error):
    with pytest.raises(RecipeError, match=error):
        read(tmp_path, rows)
