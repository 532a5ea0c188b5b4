"""Instruction pairs: what is made from a page or a row, what is dropped, and how the sides are chosen."""

import bz2
import gzip
import json
import lzma
import os
from collections import Counter

import pytest
import zstandard
from recipe.config.instruction import check_pair
from recipe.conversations import instructions, read_rows
from recipe.corpus import packaged_pairs
from recipe.corpus.characters import make_dialogue_normalizer
from recipe.corpus.normalizing import make_normalizer
from recipe.corpus.packaged import ManPage
from recipe.project import RecipeError

PAGE = """<section class="Sh"><h1 class="Sh">名前</h1><p class="Pp">ls - 一覧を表示する</p></section>
<section class="Sh"><h1>説明</h1><dl class="Bl-tag"><dt><b>-a</b>, <b>--all</b></dt>
<dd>全てを表示する。詳細は下記。</dd><dt>ファイル</dt><dd>名前</dd></dl></section>"""


def pairs(kind, monkeypatch, page):
    monkeypatch.setattr(packaged_pairs, "read_manpages", lambda folder: iter([page]))
    return [pair[:3] for pair in instructions.read_pairs(kind, {"source": "manpages"}, str, Counter())]


def test_pairs_of_a_manual_page(monkeypatch):
    page = ManPage("ls", "1", "", PAGE)
    assert pairs("command-summary", monkeypatch, page) == [
        ("コマンド ls は何をしますか?", "", "一覧を表示する")
    ]
    assert pairs("command-option", monkeypatch, page) == [
        ("ls のオプション -a, --all の意味は何ですか?", "", "全てを表示する。")
    ]
    assert pairs("command-option", monkeypatch, ManPage("fork", "2", "", PAGE)) == []


def test_a_kind_of_pairs_is_one_entry_of_the_table(monkeypatch):
    """The check of instruction.json accepts it, and stage 11's reader makes its pairs."""
    made = ("山は?", "", "高いです。", "山")
    kind = packaged_pairs.PairKind("tatoeba", lambda folder: iter([made]))
    monkeypatch.setitem(packaged_pairs.PACKAGED_PAIRS, "yes", kind)
    spec = {"source": "sentences"}
    check_pair("yes", spec, {"sentences": {"source": "tatoeba"}}, "pairs.yes")
    (found,) = instructions.read_pairs("yes", spec, str, Counter())
    assert found[:5] == ("山は?", "", "高いです。", "yes", "山")


def test_packaged_pairs_share_the_headword_of_an_equal_paragraph_or_translation(monkeypatch):
    """Else one of them would be tuned on, and the other be a held-out question."""
    packages = [
        ("a-doc", "文書", "本文です。\n詳細1"),
        ("a-dev", "開発", "本文です。\n詳細2"),
        ("b", "別", "他"),
    ]
    sentences = [("1", "山です。", "A mountain."), ("2", "山だ。", "A mountain."), ("3", "川", "A river.")]
    monkeypatch.setattr(packaged_pairs, "read_descriptions", lambda folder: iter(packages))
    monkeypatch.setattr(packaged_pairs, "read_tatoeba", lambda folder: iter(sentences))
    for name, kind in packaged_pairs.PACKAGED_PAIRS.items():
        if kind.source != "manpages":
            made = list(kind.make(None))
            assert len(made) == (6 if name == "translation" else 3), name
            headwords = [headword for *_, headword in made]
            assert headwords == {"tatoeba": ["A mountain."] * 4 + ["A river."] * 2}.get(
                kind.source, ["本文です。", "本文です。", "他"]
            )


def test_directions_choose_translations(monkeypatch):
    monkeypatch.setattr(packaged_pairs, "read_tatoeba", lambda folder: iter([("1", "山", "mountain")]))
    spec = {"source": "tatoeba", "directions": ["en-ja"]}
    (found,) = instructions.read_pairs("translation", spec, str, Counter())
    assert found[:3] == ("次の文を日本語に翻訳してください。", "mountain", "山")


@pytest.mark.parametrize("form", ["list", "lines"])
def test_alpaca_file(tmp_path, form):
    rows = [{"instruction": "訳せ", "output": "い"}, {"instruction": "訳せ", "input": "a", "output": "あ"}]
    text = json.dumps(rows) if form == "list" else "\n".join(map(json.dumps, rows))
    (tmp_path / "a.json").write_text("\ufeff" + text, "utf-8")
    found = list(instructions.read_pairs("mine", {"path": str(tmp_path / "a.json")}, str, Counter()))
    assert [pair[:3] for pair in found] == [("訳せ", "", "い"), ("訳せ", "a", "あ")]
    # Each input gives another headword; with one for all, one side of the split would be empty.
    assert found[0].headword != found[1].headword


def test_alpaca_file_without_the_columns_is_named(tmp_path):
    (tmp_path / "a.json").write_text('[{"instruction": "x", "answer": "y"}]')
    with pytest.raises(
        RecipeError, match=r"a\.json: entry 1: no column 'output'; it has \['answer', 'instruction'\]"
    ):
        list(instructions.read_pairs("mine", {"path": str(tmp_path / "a.json")}, str, Counter()))


def test_bad_line_of_an_alpaca_file_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"instruction": "x", "output": "y"}\n\n{"instruction": \n')
    with pytest.raises(RecipeError, match=r"a\.jsonl:3: not valid JSON"):
        list(instructions.read_pairs("mine", {"path": str(tmp_path / "a.jsonl")}, str, Counter()))


NO_PAIRS = [
    (b"", "an empty file"),
    (b"\xef\xbb\xbf\n \n", "an empty file"),
    (b"\n<!DOCTYPE html><html><body>Log in</body></html>", "an HTML page and no data"),
    (gzip.compress(b"[]", mtime=0), "a file of gzip, expected JSON"),
    (bz2.compress(b"[]"), "a file of bzip2, expected JSON"),
    (lzma.compress(b"[]"), "a file of xz, expected JSON"),
    (zstandard.compress(b"[]"), "a file of zstandard, expected JSON"),
    (b"PAR1....PAR1", "a file of Parquet, expected JSON"),
    (b"PK\x03\x04....", "a file of zip, expected JSON"),
    (b"[" * 100_000, "JSON that cannot be read"),
    (b'{"instruction": %s}' % (b"1" * 5000), "JSON that cannot be read"),
    (b"\xff\xfe[\0]\0", "not UTF-8 at byte 0"),
    (b'[{"instruction": "x", "output"', "not valid JSON"),
]


@pytest.mark.parametrize(("content", "reason"), NO_PAIRS)
def test_what_is_no_file_of_pairs_is_named(tmp_path, content, reason):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"a\.json:.*" + reason) as caught:
        list(instructions.read_pairs("mine", {"path": str(path)}, str, Counter()))
    assert "\n" not in str(caught.value)


def test_a_folder_a_link_to_nothing_and_a_pipe_are_no_pairs(tmp_path):
    (tmp_path / "a.json").mkdir()
    (tmp_path / "b.json").symlink_to("gone.json")
    os.mkfifo(tmp_path / "c.json")
    for name, kind in (("a", "a folder"), ("b", "a link to nothing"), ("c", "no file")):
        with pytest.raises(RecipeError, match=rf"{name}\.json, {kind}"):
            list(instructions.read_pairs("mine", {"path": str(tmp_path / f"{name}*")}, str, Counter()))


def pair(output, source="x", headword="h"):
    return instructions.Pair("指示", "", output, source, headword)


@pytest.mark.parametrize(
    ("output", "judged", "reason"),
    [
        (" ", False, "blank output"),
        ("only English", True, "answer not Japanese"),
        ("短", True, "answer too short"),
        ("山は高いです。", True, ""),
        ("はい", False, ""),
        ("print(1)", False, ""),
    ],
)
def test_why_an_answer_is_dropped(output, judged, reason):
    assert instructions.reason_to_drop(pair(output), judged) == reason


def test_pairs_of_one_headword_stay_on_one_side():
    sides = {}
    for number in range(300):
        for kind in ("a", "b"):
            sides.setdefault(number, set()).add(instructions.pair_side(pair("文", kind, f"w{number}"), 0.3))
    assert all(len(found) == 1 for found in sides.values())
    assert {"train", "valid"} == set().union(*sides.values())


@pytest.mark.parametrize(("share", "kept"), [(0.3, 3), (0, 0), (1, 9)])
def test_a_share_caps_pairs_in_an_order_of_their_own(share, kept):
    def translations(order):
        sides = {"train": [pair(f"文{i}") for i in order], "valid": [pair("文")]}
        return instructions.cap_share(sides, {"train": [pair("文")] * 7, "valid": []}, share), sides

    removed, sides = translations(range(9))
    assert removed == 9 - kept == 9 - len(sides["train"])
    assert len(sides["valid"]) == 1
    assert translations(reversed(range(9)))[1] == sides


def pairs_of(tmp_path, rows, name="a.jsonl"):
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / name).write_text(text, "utf-8")
    return list(instructions.read_pairs("mine", {"path": str(tmp_path / name)}, str, Counter()))


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def test_messages_become_the_last_exchange_and_its_history(tmp_path):
    system = {"role": "system", "content": "簡潔に"}
    (found,) = pairs_of(tmp_path, [{"messages": [system, *turns("山は?", "高い", "海は?", "深い", "空は?")]}])
    assert found[:3] == ("海は?", "", "深い")
    assert found.headword == "山は?"
    assert instructions.messages_of(found._asdict()) == [system, *turns("山は?", "高い", "海は?", "深い")]


def test_sharegpt_names_of_roles(tmp_path):
    row = {"conversations": [{"from": "human", "value": "山は?"}, {"from": "gpt", "value": "高い"}]}
    (found,) = pairs_of(tmp_path, [row])
    assert instructions.messages_of(found._asdict()) == turns("山は?", "高い")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (turns("山は?"), "no answer"),
        (turns("山は?", "高い")[::-1], "turns do not alternate"),
        (turns("山は?", "高い") * 2 + turns("海は?")[:1], ""),
        ([*turns("山は?"), *turns("海は?", "深い")], "turns do not alternate"),
        (turns("山は?", " ", "海は?", "深い"), "blank turn"),
        (turns("山は?", " "), "blank output"),
        (turns("山は?", "\ud800"), "not valid Unicode"),
    ],
)
def test_conversations_that_cannot_be_used(messages, reason):
    def normalize(text):
        return text.encode("utf-8").decode("utf-8")

    found = instructions.make_pair(messages, "x", normalize)
    assert instructions.reason_to_drop(found, False) == reason


def test_errors_in_rows_are_named(tmp_path):
    for row, message in [
        ({"messages": [{"role": "tool", "content": "x"}]}, "line 1: messages: message 1: role 'tool'"),
        ({"messages": "x"}, "line 1: messages: str, expected a list"),
        ({"instruction": "x", "output": 3}, "line 1: output: int, expected a string"),
        ({"text": "x"}, "line 1: no column 'instruction'; it has"),
    ]:
        with pytest.raises(RecipeError, match=message):
            pairs_of(tmp_path, [row])


def test_the_layout_of_a_conversation_comes_back_exactly():
    normalize = make_dialogue_normalizer({})
    question, answer = (
        "    次の ﾘｽﾄ を 訳せ:\n\n- 山\n  - 川",
        "```\n\n  for x in y:\n\treturn x\n\n```\n- 項目",
    )
    message = instructions.user_message(question, "  - 字下げ\n\n ｶﾜ")
    messages = [{"role": "user", "content": message}, *turns("", answer)[1:]]
    found = instructions.make_pair(messages, "x", normalize)
    assert found[:3] == (question.replace("ﾘｽﾄ", "リスト"), "  - 字下げ\n\n カワ", answer)
    assert instructions.messages_of(found._asdict())[-1]["content"] == answer


def test_overlap_counts_pairs_with_a_sentence_of_the_validation_text():
    shared = "これは検証用の文書にもそのまま書かれている長い文です"
    sides = {
        "train": [
            pair(f"はい。{shared}。"),
            pair(shared[:15]),
            pair("別の" + shared),
            pair(f"{shared[:2]} {shared[2:]}"),
        ],
        "valid": [pair("短い")],
    }
    texts = iter([f"前置き。\n{shared}。後書き。", "短い"])
    found = instructions.pretraining_overlap(sides, texts, make_normalizer({}))
    # The third pair shares no whole sentence; a space that the pretraining text has lost makes no difference.
    assert found == {"train": 2, "valid": 0}


def test_byte_order_marks_are_removed_and_counted(tmp_path):
    row = json.dumps({"instruction": "訳せ", "input": "", "output": "あ"})
    (tmp_path / "a.jsonl").write_text("\ufeff" + row, "utf-8")
    (tmp_path / "b.jsonl").write_text(row, "utf-8")
    spec = {"path": str(tmp_path / "*.jsonl")}
    assert read_rows.byte_order_marks("x", spec) == 1
    assert [row["instruction"] for _, row in read_rows.read_rows("x", spec)] == ["訳せ", "訳せ"]
    assert read_rows.byte_order_marks("x", {"source": "manpages"}) == 0


def test_the_table_of_pairs_names_their_origins_and_licences():
    config = {
        "dataset": {"sources": {"tatoeba": {"source": "tatoeba", "licence": "CC-BY 2.0 FR"}}},
        "instruction": {
            "pairs": {
                "translation": {"source": "tatoeba"},
                "mine": {"path": "/home/somebody/pairs.json"},
                "dolly": {"dataset": "kunishou/databricks-dolly-15k-ja"},
            }
        },
    }
    counts = {"in": 1200, "out": 1190, "dropped": {"duplicate": 10, "over translation_share": 0}}
    funnel = dict.fromkeys(config["instruction"]["pairs"], counts)
    funnel["mine"] = counts | {"byte_order_marks": 1, "characters": {"invisible characters removed": 2}}
    table = instructions.pairs_table(funnel, config, {"train": 3, "valid": 0})
    assert "| translation | tatoeba | CC-BY 2.0 FR | 1,200 | 1,190 | duplicate 10 |" in table
    assert "| mine | pairs.json | yours | 1,200 " in table  # the path itself is not published
    assert "| dolly | kunishou/databricks-dolly-15k-ja | as its publisher says |" in table
    assert "Byte order marks were removed from 1 files." in table
    assert "Found in mine: invisible characters removed 2.\n" in table
    assert "pretraining, and are kept: 3 of the train side and 0 of the valid side." in table
