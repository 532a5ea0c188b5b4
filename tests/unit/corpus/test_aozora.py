"""Aozora Bunko: prose out of the notation, and files that cannot be read."""

import io
import struct
import zipfile

import pytest
from recipe.corpus import aozora
from recipe.corpus.aozora import prose, read_works
from recipe.corpus.readers import FAULTS
from recipe.project import RecipeError, Refused

LEGEND = """-------------------------------------------------------
【テキスト中に現れる記号について】

《》：ルビ
（例）山路《やまじ》

［＃］：入力者注　主に外字の説明や、傍点の位置の指定
（例）［＃５字下げ］
-------------------------------------------------------

"""
COLOPHON = """

底本：「手本集　上巻」手本書房
　　　2001（平成13）年1月1日初版
底本の親本：「手本」手本社
入力：入力者
校正：校正者
2020年1月1日作成
青空文庫作成ファイル：
このファイルは、例です。
"""

# A work with a legend: ruby, gaiji of three kinds, headings, indents, emphasis, pictures, pages.
FOREST = f"""森の手紙
――ある秋の記録――
青空太郎

{LEGEND}［＃５字下げ］一　山道［＃「一　山道」は中見出し］

　私は山路《やまじ》を｜一人旅《ひとりたび》で歩いた。※［＃「木＋吶のつくり」、第3水準1-85-54］《ほぞ》を見た。
［＃ここから２字下げ］
紅葉［＃「紅葉」に傍点］はいよ／＼赤く、しみ／″＼と眺めた。
※［＃「王＋民」、U+73C9、12-3］と※［＃「門＋<」、34-5］があつた。
［＃ここで字下げ終わり］
［＃改ページ］
［＃挿絵（fig1.png、横320×縦240）入る］


　東京［＃「東京」の左に「とうけい」のルビ］へ帰る。｜※［＃「口＋世」、第3水準1-14-91］鳴《ていめい》。{COLOPHON}"""
FOREST_PROSE = """一　山道

　私は山路を一人旅で歩いた。枘を見た。
紅葉はいよ〳〵赤く、しみ〴〵と眺めた。
珉と〓があつた。

　東京へ帰る。呿鳴。"""

# A work without a legend: accents, literal brackets, inline notes, nested and unclosed notes.
CAFE = f"""茶店
海野花子

「〔Cafe'〕」と〔Tout a` fait〕と普通の〔注〕。《すみれ》は花の名、「《星》」も。
※［＃始め二重山括弧、1-1-52］本物※［＃終わり二重山括弧、1-1-53］と※［＃米印、1-2-8］と縦※［＃縦線、1-1-35］線。
本文［＃割り注］小さな［＃改行］字［＃割り注終わり］が続く。不［＃レ］知［＃二］彼［＃一］。
［＃「※［＃「口＋世」、第3水準1-14-91］を見る」に傍点］終り※［＃「※」は行右小書き］［＃この注は閉じない
二行目に〆切《しめきり》、ＡＢＣ《エービーシー》、三〇％《パーセント》、※［＃丸印、U+D800］。{COLOPHON}"""
CAFE_PROSE = """「Café」とTout à faitと普通の〔注〕。《すみれ》は花の名、「《星》」も。
《本物》と※と縦｜線。
本文（小さな字）が続く。不知彼。
終り※［＃この注は閉じない
二行目に〆切、ＡＢＣ、三〇％、㊞。"""


def test_work_with_a_legend():
    text, figures = prose(FOREST)
    assert text == FOREST_PROSE
    assert figures == {
        "heading lines": 3,
        "colophon lines": 8,
        "colophons above half of the text": 0,
        "ruby": 4,
        "gaiji": 3,
        "gaiji unresolved": 1,
        "notes": 8,
        "notes unclosed": 0,
        "accents": 0,
        "bad bytes": 0,
    }


def test_work_without_a_legend():
    text, figures = prose(CAFE)
    assert text == CAFE_PROSE
    assert figures == {
        "heading lines": 2,
        "colophon lines": 8,
        "colophons above half of the text": 0,
        "ruby": 3,
        "gaiji": 6,
        "gaiji unresolved": 0,
        "notes": 6,
        "notes unclosed": 1,
        "accents": 2,
        "bad bytes": 0,
    }


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_carriage_returns_change_nothing(end):
    assert prose(FOREST.replace("\n", end)) == prose(FOREST)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("漢字《かんじ》", "漢字"),
        ("送り仮名｜付き《つき》", "送り仮名付き"),
        ("｜「括弧」《かっこ》", "「括弧」"),
        ("人々《ひとびと》と※［＃二の字点、1-2-22］《と》", "人々と〻"),
        ("ルビの中※［＃「てへん＋劣」、第3水準1-84-77］《※［＃小書き片仮名ヒ、1-6-84］》", "ルビの中挘"),
        ("東京［＃「東京」に傍点］《とうきょう》", "東京"),
        ("一行目《\n二行目》", "一行目《\n二行目》"),  # no ruby goes over a line
        ("閉じない《ルビ", "閉じない《ルビ"),
        ("縦棒｜だけ", "縦棒｜だけ"),
        ("面区点※［＃「けものへん＋章」、第4水準2-80-48］", "面区点㺔"),
        ("※［＃「にんべん＋予」、U+4F40、123-4］", "佀"),
        ("※［＃「土へん＋吉」、U+20BB7、5-6］", "𠮷"),
        ("※［＃半濁点付き平仮名か、1-4-87］", "か゚"),  # two code points
        ("※［＃「木＋吶のつくり」］", "枘"),  # by its description alone
        ("※［＃「口＋世」］", "呭"),
        ("※［＃「知らない字」、99-1］", "〓"),
        ("※［＃無い面区点、1-99-99］", "〓"),
        ("※［＃頁と行、31-2-22］", "〓"),
        ("字※［＃始め二重山括弧、1-1-52］字※［＃終わり二重山括弧、1-1-53］", "字《字》"),
        ("※［＃無い面区点、1-15-95］", "〓"),
        ("※［＃代用対、U+D842］", "〓"),
        ("※［＃大き過ぎる、U+110000］", "〓"),
        ("※［＃私用、U+E000］", "〓"),
        ("※［＃「※［＃「口＋世」、第3水準1-14-91］＋人」、1-2-3］", "■"),
        ("［＃４字下げ］見出し［＃「見出し」は大見出し］", "見出し"),
        ("前\n　［＃ここから１段階小さな文字］\n中\n［＃ここで小さな文字終わり］\n後", "前\n中\n後"),
        ("前\n\n［＃改丁］\n\n後", "前\n\n後"),
        ("［＃ここから割り注］注［＃ここで割り注終わり］", "（注）"),
        ("〔A^ge d'or〕〔n~o oe&il〕", "Âge d'orño œil"),
        ("〔1`2〕〔注&釈〕", "〔1`2〕〔注&釈〕"),
        ("<b>&amp;〔e'<i>&lt;〕", "<b>&amp;é<i>&lt;"),
        ("いよ／＼、しみ／″＼", "いよ〳〵、しみ〴〵"),
        ("不明\ufffdの字", "不明〓の字"),
        ("a\n　\n\n\nb", "a\n\nb"),
        ("　字下げは残る", "　字下げは残る"),
        ("", ""),
    ],
)
def test_construct(raw, expected):
    assert prose(raw)[0] == expected


@pytest.mark.parametrize(
    "raw",
    [
        "一行目\n二行目\n\n三行目",  # no legend, no colophon: not a file of the library
        "段落。" + "\n続き。" * 6 + "\n\n三行目\n\n",  # too long for a heading
        "一行だけ\n\n本文",
        "題\n\n----------------------\n線の間\n----------------------\n\n本文",
        "本文\n底本：は空行の後でだけ奥付",
    ],
)
def test_text_that_is_not_heading_or_colophon_stays(raw):
    assert prose(raw)[0] == raw.strip("\n")


@pytest.mark.parametrize("lines", [1, 7])
def test_heading_without_a_legend_has_two_to_six_lines(lines):
    raw = "題" + "\n続き" * (lines - 1) + "\n\n本文"
    assert prose(raw + COLOPHON)[0] == raw


BODY = "　本文の一行目である。\n" * 30 + "　最後の行である。"


@pytest.mark.parametrize(
    "colophon",
    [
        "底本：「手本集」手本書房\n　　　2001年初版\n入力：甲\n校正：乙\n",
        "［＃ここで字下げ終わり］\n底本：「手本集」\n入力者：甲\n",
        "　底本:「手本集」\n青空文庫作成ファイル：\n",
        "翻訳の底本：手本集\n※注がある。\n2001年1月1日作成\nテキスト入力：甲",
        "底本：「上巻」\n底本：「下巻」\n校正：乙\n",
        "［＃本文終わり］\n底本のない奥付。\n",
        "\n\n底本：「手本集」だけの奥付\n",
    ],
)
def test_colophon_is_found_by_what_follows_it(colophon):
    text, figures = prose(f"題\n名\n\n{LEGEND}{BODY}\n{colophon}")
    assert text == BODY
    assert figures["colophons above half of the text"] == 0


def test_a_line_of_prose_that_looks_like_a_colophon_stays():
    body = f"底本：とは何か。\n{BODY}\n底本：この行も本文である。\n\n{BODY}"
    assert prose(f"題\n名\n\n{LEGEND}{body}{COLOPHON}")[0] == body


def test_colophon_that_is_most_of_a_text_is_counted():
    figures = prose(f"題\n名\n\n短い詩。{COLOPHON}{BODY}")[1]
    assert figures["colophons above half of the text"] == 1


# ------------------------------------------------------------------------------------------------- files


def work(number, legend=True, colophon=COLOPHON):
    """A work of a name and a body of its own, and its body."""
    body = f"　第{number}の本文である。\n　二行目である。"
    return f"題{number}\n作者\n\n{LEGEND if legend else ''}{body}{colophon}", body


@pytest.mark.parametrize("gap", ["", "\n", "\n\n\n"])
@pytest.mark.parametrize("legend", [True, False])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_joined_works_are_split(tmp_path, gap, legend, end):
    works, bodies = zip(*(work(number, legend) for number in range(3)), strict=True)
    text = gap.join(works)
    path = write(tmp_path, "all.txt", text.replace("\n", end).encode("cp932"))
    documents = list(read_works(path))
    assert [prose(document.text)[0] for document in documents] == list(bodies)
    assert "".join(document.text for document in documents) == text  # every byte is in one of them
    lines = [text.count("\n", 0, text.index(f"題{number}")) + 1 for number in range(3)]
    assert [document.name for document in documents] == [f"{path}:{line}" for line in lines]


def test_joined_works_without_a_colophon_are_split_at_the_heading(tmp_path):
    first, second = work(1, colophon="\n\n"), work(2)
    documents = list(read_works(write(tmp_path, "all.txt", (first[0] + second[0]).encode())))
    assert [prose(document.text)[0] for document in documents] == [first[1], second[1]]


def test_a_colophon_of_two_books_is_not_a_second_work(tmp_path):
    text = work(1)[0] + "底本：「手本集　下巻」\n入力：丙\n校正：丁\n"
    assert [document.text for document in read_works(write(tmp_path, "a.txt", text.encode()))] == [text]


def zipped(members, method=zipfile.ZIP_DEFLATED):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", method) as file:
        for name, content in members:
            file.writestr(name, content)
    return archive.getvalue()


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return path


SJIS = FOREST.replace("\n", "\r\n").encode("cp932")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", SJIS),
        ("a.txt", FOREST.encode()),
        ("a.txt", FOREST.encode("utf-8-sig")),
        ("a.zip", zipped([("fig1.png", b"\x89PNG"), ("mori.txt", SJIS)])),
        ("A.ZIP", zipped([("MORI.TXT", FOREST.encode())], zipfile.ZIP_STORED)),
    ],
)
@pytest.mark.parametrize("tolerant", [False, True])
def test_work_is_read_from_every_form(tmp_path, name, content, tolerant):
    path = write(tmp_path, name, content)
    (document,) = read_works(path, tolerant)
    assert (document.name, document.dropped) == (str(path), "")
    assert document.text.replace("\r\n", "\n") == FOREST


def test_characters_that_only_cp932_has(tmp_path):
    (document,) = read_works(write(tmp_path, "a.txt", "①ⅲ㈱髙﨑～".encode("cp932")))
    assert document.text == "①ⅲ㈱髙﨑～"


def test_bad_shift_jis_byte_is_named_or_replaced_and_counted(tmp_path):
    raw = "一行目\r\n二行目".encode("cp932") + b"\xfd\x82" + ("\r\n" + "三行目" * 99).encode("cp932")
    path = write(tmp_path, "a.txt", raw)
    with pytest.raises(RecipeError, match=r"a\.txt:2: bad Shift_JIS: 2 of 307 characters"):
        list(read_works(path))
    (document,) = read_works(path, tolerant=True)
    text, figures = prose(document.text)
    assert text.startswith("一行目\n二行目〓") and text.endswith("三行目")
    assert not document.dropped and figures["bad bytes"] == document.text.count("\ufffd") > 0


def test_file_in_another_encoding_is_dropped(tmp_path):
    path = write(tmp_path, "a.txt", "これは別の符号化です。".encode("utf-16"))
    (document,) = read_works(path, tolerant=True)
    assert document.dropped == "bad Shift_JIS"
    with pytest.raises(RecipeError, match=r"a\.txt:1: bad Shift_JIS"):
        list(read_works(path))


def link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


def encrypted():
    raw = bytearray(zipped([("a.txt", b"x")]))
    raw[6] |= 1  # the flags in the local header, and in the directory
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    return bytes(raw)


def unknown_method():
    raw = bytearray(zipped([("a.txt", b"x")]))
    struct.pack_into("<H", raw, 8, 77)
    struct.pack_into("<H", raw, raw.index(b"PK\x01\x02") + 10, 77)
    return bytes(raw)


GOOD = zipped([("a.txt", SJIS)])


@pytest.mark.parametrize(
    ("name", "content", "reason", "words"),
    [
        ("a.txt", b"", "empty file", "no text in it"),
        ("a.txt", "\r\n　\r\n".encode("cp932"), "empty file", "no text in it"),
        ("a.txt", b"x" * 10_001, "too long", "more than 10,000 bytes"),
        ("a.zip", zipped([("a.txt", b"x" * 10_001)]), "too long", "more than 10,000 bytes"),  # 1,000 : 1
        ("a.zip", zipped([("a.txt", b"")]), "empty file", "no text in it"),
        ("a.zip", zipped([("a.png", b"x")]), "unusable archive", r"0 \.txt files"),
        ("a.zip", zipped([("a.txt", b"x"), ("b.txt", b"y")]), "unusable archive", r"2 \.txt files"),
        ("a.zip", zipped([(link("a.txt"), b"/etc/hostname")]), "unusable archive", r"'a\.txt' is a link"),
        ("a.zip", encrypted(), "unusable archive", r"'a\.txt' is encrypted"),
        ("a.zip", unknown_method(), "damaged archive", "compression method"),
        ("a.zip", b"", "damaged archive", "not a zip file"),
        ("a.zip", SJIS, "damaged archive", "not a zip file"),
        ("a.zip", GOOD[: len(GOOD) // 2], "damaged archive", "not a zip file"),
        ("a.zip", GOOD[:60] + b"\0\0\0\0" + GOOD[64:], "damaged archive", ""),
    ],
)
def test_fault_in_a_file(tmp_path, monkeypatch, name, content, reason, words):
    monkeypatch.setattr(aozora, "MAXIMUM_BYTES", 10_000)
    path = write(tmp_path, name, content)
    with pytest.raises(RecipeError, match=f"{name}: {reason}: .*{words}"):
        list(read_works(path))
    (document,) = read_works(path, tolerant=True)
    assert (document.name, document.dropped) == (str(path), reason)
    assert reason in FAULTS


def test_no_damage_of_an_archive_gives_another_text(tmp_path):
    """Every byte changed, and every length cut to: the same text or a fault, never another error."""
    good = zipped([("a.txt", b"text")])
    damaged = [good[:length] for length in range(len(good))]
    for place in range(len(good)):
        damaged += [
            good[:place] + bytes([good[place] ^ bits]) + good[place + 1 :] for bits in (1, 0x80, 0xFF)
        ]
    found = set()
    for content in damaged:
        (document,) = read_works(write(tmp_path, "a.zip", content), tolerant=True)
        found.add(document.dropped)
        assert document.dropped in FAULTS or document.text == "text"
    assert {"", "damaged archive", "unusable archive"} <= found


@pytest.mark.parametrize("name", ["../../evil.txt", "/tmp/evil.png"])
def test_an_archive_that_leads_outside_is_refused_and_nothing_is_written(tmp_path, name):
    folder = tmp_path / "data"
    folder.mkdir()
    path = write(folder, "a.zip", zipped([("a.txt", b"text"), (name, b"x")]))
    with pytest.raises(RecipeError, match="unusable archive: .*leads outside"):
        list(read_works(path))
    assert sorted(tmp_path.rglob("*")) == [folder, path]


@pytest.mark.parametrize("tolerant", [False, True])
def test_unknown_kind_is_always_refused(tmp_path, tolerant):
    with pytest.raises(RecipeError, match=r"unknown kind of file '\.html'; expected \.txt or \.zip"):
        list(read_works(write(tmp_path, "a.html", b"x"), tolerant))


def test_missing_file_is_not_a_fault(tmp_path):
    with pytest.raises(FileNotFoundError):
        list(read_works(tmp_path / "a.zip", tolerant=True))


def test_a_missing_library_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Refused, match="needs the package aozora, .* x86_64 only. With Rust installed, `pip"):
        aozora.require_notation()
