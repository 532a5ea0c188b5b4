"""Instruction pairs: what is taken from a page or a description, what is dropped, how sides are chosen."""

import json

import pytest
from recipe import instructions
from recipe.outputs import RecipeError
from recipe.sources import ManPage

PAGE = """<section class="Sh"><h1 class="Sh">名前</h1><p class="Pp">ls - 一覧を表示する</p></section>
<section class="Sh"><h1>説明</h1><dl class="Bl-tag"><dt><b>-a</b>, <b>--all</b></dt>
<dd>全てを表示する。詳細は下記。</dd><dt>ファイル</dt><dd>名前</dd></dl></section>"""


def pairs(kind, monkeypatch, page):
    monkeypatch.setattr(instructions, "read_manpages", lambda folder: iter([page]))
    return [pair[:3] for pair in instructions.read_pairs(kind, {"source": "manpages"}, str)]


def test_pairs_of_a_manual_page(monkeypatch):
    page = ManPage("ls", "1", "", PAGE)
    assert pairs("command-summary", monkeypatch, page) == [
        ("コマンド ls は何をしますか?", "", "一覧を表示する")
    ]
    assert pairs("command-option", monkeypatch, page) == [
        ("ls のオプション -a, --all の意味は何ですか?", "", "全てを表示する。")
    ]
    assert pairs("command-option", monkeypatch, ManPage("fork", "2", "", PAGE)) == []


@pytest.mark.parametrize("form", ["list", "lines"])
def test_alpaca_file(tmp_path, form):
    rows = [{"instruction": "訳せ", "output": "い"}, {"instruction": "訳せ", "input": "a", "output": "あ"}]
    text = json.dumps(rows) if form == "list" else "\n".join(map(json.dumps, rows))
    (tmp_path / "a.json").write_text("\ufeff" + text, "utf-8")
    found = list(instructions.read_pairs("mine", {"path": str(tmp_path / "a.json")}, str))
    assert [pair[:3] for pair in found] == [("訳せ", "", "い"), ("訳せ", "a", "あ")]
    # One instruction with different inputs is as many headwords, or one side of the split would stay empty.
    assert found[0].headword != found[1].headword


def test_alpaca_file_without_the_columns_is_named(tmp_path):
    (tmp_path / "a.json").write_text('[{"instruction": "x", "answer": "y"}]')
    with pytest.raises(
        RecipeError, match=r"a\.json: entry 1: no text in 'output'; it has \['answer', 'instruction'\]"
    ):
        list(instructions.read_pairs("mine", {"path": str(tmp_path / "a.json")}, str))


def test_bad_line_of_an_alpaca_file_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"instruction": "x", "output": "y"}\n\n{"instruction": \n')
    with pytest.raises(RecipeError, match=r"a\.jsonl:3: not valid JSON"):
        list(instructions.read_pairs("mine", {"path": str(tmp_path / "a.jsonl")}, str))


def pair(output, source="x", headword="h"):
    return instructions.Pair("指示", "", output, source, headword)


@pytest.mark.parametrize(
    ("output", "source", "reason"),
    [
        (" ", "x", "blank output"),
        ("only English", "x", "answer not Japanese"),
        ("only English", "translation", ""),
        ("短", "x", "answer too short"),
        ("山は高いです。", "x", ""),
    ],
)
def test_reasons(output, source, reason):
    assert instructions.reason_to_drop(pair(output, source)) == reason


def test_a_headword_stands_on_one_side():
    sides = {}
    for number in range(300):
        for kind in ("a", "b"):
            sides.setdefault(number, set()).add(instructions.pair_side(pair("文", kind, f"w{number}"), 0.3))
    assert all(len(found) == 1 for found in sides.values())
    assert {"train", "valid"} == set().union(*sides.values())
