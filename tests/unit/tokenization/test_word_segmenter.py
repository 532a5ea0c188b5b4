"""Segmentation: `join` restores the text, and a segmenter that fails or changes the text is noticed.

Sudachi is real. Juman++ and MeCab are stub programs with their formats, so that tests can make them fail.
"""

import os
import random
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
from recipe.project import ROOT, RecipeError, Refused
from recipe.tokenization import word_segmenter
from recipe.tokenization.word_segmenter import Segmenter, join, make_segmenter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HARD = [
    "私はLinux 6.1を使う。",
    "  二つ  の  空白  ",
    "タブ\tと\n\n改行\r\nと　全角\u00a0空白",
    "",
    "\n",
    " \n ",
    "▁␉␊␛の印と␛3000と␛▁",
    "# 注釈ではない",
    "New York タイムズ @ EOS",
    "👨‍👩‍👧‍👦と𠮷野家",
    "か\u3099 ﾊﾝｶｸ Ａ",
    "\x1c\x85\u2028行でない行\u2003",
]


def mixed_lines(count: int) -> list[str]:
    """Lines of Japanese, English, symbols and white space in any order; the draw is seeded."""
    draw = random.Random(1)
    parts = [
        "日本語",
        "処理する",
        "Linux",
        "the",
        "foo_bar(a, b)",
        "10〜20時",
        "、",
        "。",
        "「見出し」",
        "--help",
        "▁",
        "␛",
    ]
    spaces = ["", "", "", "", " ", " ", "  ", "\t", "　", "\u00a0"]
    return [
        "".join(draw.choice(parts) + draw.choice(spaces) for _ in range(draw.randrange(1, 15)))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def sudachi(tmp_path_factory):
    return make_segmenter("sudachi", tmp_path_factory.mktemp("data"))


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Put a Python script on PATH, alone."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def make(name: str, source: str) -> None:
        path = folder / name
        path.write_text(f"#!{sys.executable}\n" + textwrap.dedent(source), "utf-8")
        path.chmod(0o755)

    return make


# What Juman++ 2 does, as its source has it: an answer for each line, "# " begins a comment, at most 4,096
# bytes, an @ before other readings; and what may happen to a line, called up by certain characters.
JUMANPP = r"""
    import os, re, signal, sys
    assert sys.argv[1:] == ["--juman"], sys.argv
    for line in sys.stdin.buffer.read().decode().split("\n"):
        if line.startswith("# ") and len(line) > 2:
            continue
        if len(line.encode()) > 4096 or "誤" in line:
            print("# ERROR\nEOS")
            continue
        if "壊" in line:
            os._exit(139)
        if "殺" in line:
            os.kill(os.getppid(), signal.SIGKILL)
        for word in re.findall(r"[a-zA-Z]+|\d+|[ぁ-ん]+|[一-龠々]+|[ァ-ー]+|.", line):
            if word == "ABC":
                word = "".join(chr(ord(c) + 0xfee0) for c in word)  # full width
            row = f"{word} {word} {word} 名詞 6 普通名詞 1 * 0 * 0 NIL"
            if "落" not in word:
                print(row)
            if word in ("橋", "@"):
                print("@ " + row)
        print("EOS", flush=True)
"""


@pytest.mark.extra("sudachi")
def test_the_form_that_reaches_a_tokenizer(sudachi):
    text = "私はLinux 6.1を使う。\n\n  \t▁と　\x0b終り"
    assert sudachi.segment([text]) == ["私 は Linux ▁ 6.1 を 使う 。 ␊\n␊\n▁▁␉ ␛▁ と ␛3000␛000b 終り"]


@pytest.mark.extra("sudachi")
def test_join_is_exact(sudachi):
    texts = HARD + mixed_lines(1000)
    segmented = sudachi.segment(texts)
    assert [join(text) for text in segmented] == texts
    assert [text.count("\n") for text in segmented] == [text.count("\n") for text in texts]
    assert not any(re.search(r"[^\S \n]|  |^ | $", text, re.MULTILINE) for text in segmented)
    assert sudachi.counts["left whole"] == sudachi.counts["repaired"] == 0


@pytest.mark.extra("sudachi")
def test_every_white_space_and_every_mark_comes_back(sudachi):
    characters = [c for c in map(chr, range(0x110000)) if c.isspace() or c in "▁␉␊␛"]
    text = "".join(f"語{c}{c}abc{c}12" for c in characters)
    assert join(sudachi.segment([text])[0]) == text


def test_join_takes_what_a_model_makes():
    assert join("a ␛ z ␛ 30 00 ▁ ␛") == "a␛z\u3000 ␛"


@pytest.mark.extra("sudachi")
@pytest.mark.parametrize("decoder", [None, decoders.Fuse()])
def test_exact_through_bpe_over_whitespace(sudachi, decoder):
    texts = HARD + mixed_lines(300)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(sudachi.segment(texts), trainer)
    tokenizer.decoder = decoder

    def through(segmented: str) -> str:
        return tokenizer.decode(tokenizer.encode(segmented).ids)

    assert [join(through(segmented)) for segmented in sudachi.segment(texts)] == texts
    # The only loss is a character outside the vocabulary.
    segmented = sudachi.segment(["日本語 処理", "龘の 処理"])
    assert list(map(join, map(through, segmented))) == ["日本語 処理", "の 処理"]


@pytest.mark.extra("sudachi")
def test_half_of_a_surrogate_pair_is_refused(sudachi):
    with pytest.raises(RecipeError, match=r"'\\ud800' in '\\u5f8c\\ud800\\u5148'"):
        sudachi.segment(["前", "後\ud800先"])


@pytest.mark.extra("sudachi")
def test_parallel_is_the_same_in_the_same_order(sudachi, monkeypatch):
    monkeypatch.setattr(word_segmenter, "BATCH", 500)
    texts = HARD + mixed_lines(300)
    alone, together = Segmenter("sudachi"), Segmenter("sudachi")
    taken = []
    results = together.parallel((taken.append(text) or text for text in texts), 2)
    first = next(results)
    assert len(taken) < 100  # four batches, not everything
    assert [first, *results] == alone.segment(texts) == list(Segmenter("sudachi").parallel(texts, 1))
    assert together.counts == alone.counts
    assert alone.counts["parts"] > 300


def test_jumanpp(program, tmp_path):
    program("jumanpp", JUMANPP)
    segmenter = make_segmenter("jumanpp", tmp_path)
    texts = ["橋の上 @ 橋", "# 注釈でない", "EOS", "@", "言語　処理\n"]
    assert segmenter.segment(texts) == [
        "橋 の 上 ▁ @ ▁ 橋",
        "# ▁ 注釈 でない",
        "EOS",
        "@",
        "言語 ␛3000 処理 ␊\n",
    ]
    assert segmenter.counts == {"parts": 5}
    assert list(map(join, segmenter.segment(HARD))) == HARD


@pytest.mark.parametrize(
    ("text", "expected", "counted"),
    [
        ("ABCの橋", "ABC の 橋", "repaired"),  # narrow letters came back wide
        ("部落の 長", "部落の ▁ 長", "left whole"),  # lost a character
        ("誤の 行", "誤の ▁ 行", "left whole"),  # could not be analysed
        ("誤", "誤", "left whole"),
        ("壊す 行", "壊す ▁ 行", "left whole"),  # the program crashed
    ],
)
def test_what_a_segmenter_does_to_a_line_never_touches_the_text(program, tmp_path, text, expected, counted):
    program("jumanpp", JUMANPP)
    segmenter = make_segmenter("jumanpp", tmp_path)
    assert segmenter.segment(["前の行", "前の行", text, "後の行"]) == [
        "前 の 行",
        "前 の 行",
        expected,
        "後 の 行",
    ]
    assert segmenter.counts == {"parts": 4, counted: 1}


def test_long_lines_are_cut_where_a_segmenter_would_refuse_them(program, tmp_path):
    program("jumanpp", JUMANPP)
    segmenter = make_segmenter("jumanpp", tmp_path)
    text = "𠮷" * 2500 + "猫が歩く。" * 1000 + " a" * 2000
    (segmented,) = segmenter.segment([text])
    assert join(segmented) == text
    assert segmented.count("猫 が 歩 く 。") == 1000
    assert segmenter.counts["left whole"] == 0
    assert segmenter.counts["parts"] > 10


def test_killed_worker(program, tmp_path):
    program("jumanpp", JUMANPP)
    segmenter = make_segmenter("jumanpp", tmp_path)
    with pytest.raises(RecipeError, match="killed, perhaps for lack of memory"):
        list(segmenter.parallel(["前", "殺", "後"], 2))


def test_program_without_its_model(program, tmp_path):
    program("jumanpp", "import sys; sys.exit('failed to load model from disk')")
    with pytest.raises(RecipeError, match="exit 1, answer '', message 'failed to load model from disk'"):
        make_segmenter("jumanpp", tmp_path)


def test_program_that_stops_working(program, tmp_path):
    program("jumanpp", JUMANPP)
    segmenter = make_segmenter("jumanpp", tmp_path)
    program("jumanpp", "import sys; sys.exit('disk gone')")
    with pytest.raises(RecipeError, match="disk gone"):
        segmenter.segment(["前", "後"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mecb", "unknown segmenter 'mecb'. Did you mean 'mecab'?.*Known: jumanpp, mecab, sudachi"),
        ("janome", "unknown segmenter 'janome'. Known"),
        ("jumanpp", "`jumanpp` is not on PATH. Build a release of Juman"),
        ("mecab", "`mecab` with a JUMAN dictionary.*Install MeCab.*mecab-jumandic-utf8.*sudachi"),
    ],
)
def test_refused_with_the_way_out(tmp_path, monkeypatch, name, message):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Refused, match=message):
        make_segmenter(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


# A MeCab that finds its dictionary as MeCab does, and cuts between scripts.
MECAB = r"""
    import re, sys
    from pathlib import Path
    arguments = sys.argv[1:]
    folder = Path(arguments[arguments.index("-d") + 1] if "-d" in arguments else DEFAULT)
    if "-D" in arguments:
        print(f"filename:\t{folder}/sys.dic\nversion:\t102\n" + (folder / "sys.dic").read_text())
    else:
        assert arguments[-2:] == ["-O", "wakati"] and "utf" in (folder / "sys.dic").read_text().lower()
        for line in sys.stdin.buffer.read().decode().split("\n"):
            print(*re.findall(r"[a-zA-Z]+|\d+|[ぁ-ん]+|[一-龠々]+|[ァ-ー]+|\S", line), "")
"""


def test_mecab_of_the_system_with_its_juman_dictionary(program, tmp_path):
    for name, charset in {"ipadic": "UTF-8", "juman": "EUC-JP", "juman-utf8": "utf-8"}.items():
        (tmp_path / "dic" / name).mkdir(parents=True)
        (tmp_path / "dic" / name / "sys.dic").write_text(f"charset:\t{charset}\n")
    program("mecab", f"DEFAULT = {str(tmp_path / 'dic/ipadic')!r}\n" + textwrap.dedent(MECAB))
    segmenter = make_segmenter("mecab", tmp_path / "data")
    assert segmenter.command[-4:] == ["-d", str(tmp_path / "dic/juman-utf8"), "-O", "wakati"]
    assert segmenter.segment(["# 山の Linux"]) == ["# ▁ 山 の ▁ Linux"]
    assert not (tmp_path / "data").exists()


def make_package(folder, name, files):
    """A Debian package of executable files."""
    for path, content in {
        "DEBIAN/control": f"Package: {name}\nVersion: 1\nArchitecture: all\n",
        **files,
    }.items():
        target = folder / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
        target.chmod(0o755)
    for field in ("Maintainer: nobody", "Description: stub"):
        with (folder / name / "DEBIAN/control").open("a") as handle:
            handle.write(field + "\n")
    subprocess.run(
        ["dpkg-deb", "--build", folder / name, folder / f"{name}_1_all.deb"], check=True, capture_output=True
    )


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="dpkg-deb is not on this system")
def test_mecab_is_fetched_and_built_once(program, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}{os.pathsep}{os.defpath}")
    packages = tmp_path / "packages"
    python = f"#!{sys.executable}\n"
    index = """
        import shutil, sys
        from pathlib import Path
        source, target = (Path(sys.argv[sys.argv.index(flag) + 1]) for flag in ("-d", "-o"))
        assert (source / "words.csv").exists()
        (target / "sys.dic").write_text("charset:\\t" + sys.argv[sys.argv.index("-t") + 1] + "\\n")
    """
    make_package(packages, "mecab", {"usr/bin/mecab": python + textwrap.dedent(MECAB)})
    make_package(packages, "libmecab2", {"usr/lib/some-linux/libmecab.so.2": ""})
    make_package(packages, "mecab-utils", {"usr/lib/mecab/mecab-dict-index": python + textwrap.dedent(index)})
    dictionary = {f"usr/share/mecab/dic/juman/{name}": "" for name in ("dicrc", "words.csv")}
    make_package(packages, "mecab-jumandic-utf8", dictionary)
    program(
        "apt-get",
        f"""
        import shutil, sys
        with open({str(tmp_path / "calls")!r}, "a") as calls:
            calls.write("called\\n")
        if "download" in sys.argv:
            for name in sys.argv[sys.argv.index("download") + 1:]:
                shutil.copy({str(packages)!r} + f"/{{name}}_1_all.deb", ".")
        """,
    )
    monkeypatch.setattr(word_segmenter, "_system_mecab", lambda: None)
    data = tmp_path / "data"
    data.mkdir()
    segmenter = make_segmenter("mecab", data)
    assert segmenter.segment(["山の上"]) == ["山 の 上"]
    assert sorted(path.name for path in (data / ".tools").iterdir()) == ["mecab"]
    assert sorted(path.name for path in (data / ".tools/mecab/dic").iterdir()) == ["dicrc", "sys.dic"]
    assert not (
        data / ".tools/mecab/usr/share/mecab"
    ).exists()  # sources of the dictionary, larger than itself
    calls = (tmp_path / "calls").read_text()
    make_segmenter("mecab", data)
    assert (tmp_path / "calls").read_text() == calls


def test_failing_fetch_leaves_nothing_and_says_why(program, tmp_path):
    program("apt-get", "import sys; sys.exit('E: no such host')")
    program("dpkg-deb", "")
    with pytest.raises(
        RecipeError, match=r"download of mecab failed:(.|\n)*no such host(.|\n)*or use the segmenter sudachi"
    ):
        make_segmenter("mecab", tmp_path / "data")
    assert list((tmp_path / "data/.tools").iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="MeCab comes as a Debian package: no dpkg-deb here")
def test_real_mecab():
    """Fetches MeCab and its dictionary on first use, as stage 03 does."""
    segmenter = make_segmenter("mecab", ROOT / "data")
    texts = HARD + mixed_lines(1000)
    assert list(map(join, segmenter.segment(texts))) == texts
    assert segmenter.segment(["早稲田大学で自然言語処理を"]) == ["早稲田 大学 で 自然 言語 処理 を"]
