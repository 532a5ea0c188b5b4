"""Downloads from a server and a network that fail in many ways.

No wrong file is kept, and no byte that was received is requested again.
"""

import datetime
import email.utils
import hashlib
import http.server
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import types

import pytest
from recipe import project
from recipe.corpus import download, fetch
from recipe.project import RecipeError, Refused

PACKAGE = project.ROOT / "pretrain"
CONTENT = random.Random(1).randbytes(3_000_000)
OTHER = random.Random(2).randbytes(3_000_000)
HALF = len(CONTENT) // 2


class Site(http.server.ThreadingHTTPServer):
    """A file server on loopback with ranges, If-Range and an ETag.

    faults: one for each coming GET, then all goes well: ``{"status": 503, "headers": {}}``, ``{"cut": n}``
    (close after n bytes), ``{"stall": n}`` (fall silent after n bytes), or attributes to set from then on.
    requests: [method, Range, status, body bytes sent] of each request.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.modified = CONTENT, '"one"', ""
        self.ranges, self.heeds_if_range, self.tells_length = True, True, True
        self.chunked, self.pause, self.claims = False, 0.0, 0
        self.faults, self.requests, self.moved = [], [], {}
        self.awake = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/text.bin"

    def handle_error(self, request, client_address):
        """Print nothing: clients that disconnect are part of the tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer({}, body=False)

    def do_GET(self):
        fault = self.server.faults.pop(0) if self.server.faults else {}
        for name in fault.keys() - {"status", "headers", "cut", "stall"}:
            setattr(self.server, name, fault[name])
        self.answer(fault)

    def answer(self, fault, body=True):
        site, asked = self.server, self.headers.get("Range")
        self.entry = [self.command, asked, fault.get("status", 200), 0]
        site.requests.append(self.entry)
        status, headers, start = fault.get("status", 200), dict(fault.get("headers", {})), 0
        if self.path in site.moved:
            status, headers = 302, {"Location": site.moved[self.path]}
        if status != 200:
            self.finish_with(status, headers | {"Content-Length": "0"}, b"", fault)
            return
        total = len(site.content)
        valid = self.headers.get("If-Range", site.etag) in (site.etag, site.modified)
        if asked and site.ranges and (valid or not site.heeds_if_range):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= total:
                self.finish_with(416, {"Content-Range": f"bytes */{total}", "Content-Length": "0"}, b"", {})
                return
            status, headers["Content-Range"] = 206, f"bytes {start}-{total - 1}/{total}"
        headers |= {"ETag": site.etag} if site.etag else {}
        headers |= {"Last-Modified": site.modified} if site.modified else {}
        if site.chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif site.tells_length:
            headers["Content-Length"] = str(site.claims or total - start)
        self.finish_with(status, headers, site.content[start:] if body else b"", fault)

    def finish_with(self, status, headers, body, fault):
        self.entry[2] = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        end = min(fault.get("cut", len(body)), fault.get("stall", len(body)))
        for i in range(0, end, 1 << 16):
            piece = body[i : min(i + (1 << 16), end)]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self.server.chunked else piece)
            self.entry[3] += len(piece)
            time.sleep(self.server.pause)
        if self.server.chunked and end == len(body):
            self.wfile.write(b"0\r\n\r\n")
        if "stall" in fault:
            self.server.awake.wait(20)


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Site() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.awake.set()
        server.shutdown()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def fetched(site, target, **wishes):
    """`fetch` with short pauses. The file must be complete, with only its state file next to it."""
    facts = fetch.fetch(site.url, target, **{"timeout": 30, "pause": 0.001} | wishes)
    assert target.read_bytes() == site.content
    assert sorted(p.name for p in target.parent.iterdir()) == [f".{target.name}.json", target.name]
    assert (facts["bytes"], facts["sha256"]) == (len(site.content), sha256(site.content))
    return facts


def ranges(site):
    return [asked for _, asked, *_ in site.requests]


# ------------------------------------------------------------------------------------ what is tried again


def test_lost_connection_is_resumed(site, tmp_path):
    site.faults = [{"cut": HALF}, {"cut": 1000}]
    facts = fetched(site, tmp_path / "x")
    assert ranges(site) == [None, f"bytes={HALF}-", f"bytes={HALF + 1000}-"]
    assert sum(sent for *_, sent in site.requests) == len(CONTENT)  # not one byte came twice
    assert facts["version"] == '"one"' and facts["url"] == site.url


def test_stalled_server_is_retried(site, tmp_path, capsys):
    site.faults = [{"stall": HALF}]
    fetched(site, tmp_path / "x", timeout=0.3)
    assert ranges(site) == [None, f"bytes={HALF}-"]
    assert "timed out" in capsys.readouterr().err  # and not: the server closed the connection in the end


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_temporary_status_is_retried(site, tmp_path, status):
    site.faults = [{"status": status}] * 3
    fetched(site, tmp_path / "x")
    assert [status for *_, status, _ in site.requests] == [status] * 3 + [200]


@pytest.fixture
def pauses(monkeypatch):
    """The seconds that downloads would have slept."""
    slept = []
    monkeypatch.setattr(fetch, "time", types.SimpleNamespace(sleep=slept.append))
    return slept


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_respected(site, tmp_path, form, pauses):
    date = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=500)
    value = "500" if form == "seconds" else email.utils.format_datetime(date, usegmt=True)
    site.faults = [{"status": 429, "headers": {"Retry-After": value}}]
    fetched(site, tmp_path / "x")
    assert len(pauses) == 1 and 450 < pauses[0] <= 500


def test_too_long_retry_after_is_an_error(site, tmp_path, pauses):
    site.faults = [{"status": 503, "headers": {"Retry-After": "7200"}}]
    with pytest.raises(RecipeError, match="asks to wait 7,200 s"):
        fetched(site, tmp_path / "x")
    assert len(site.requests) == 1 and not pauses


def test_pauses_double_with_jitter_and_attempts_are_limited(site, tmp_path, pauses, capsys):
    site.faults = [{"status": 503}] * 99
    with pytest.raises(RecipeError, match=r"cannot be downloaded: HTTP 503.*run again"):
        fetched(site, tmp_path / "x", pause=1.0)
    assert len(site.requests) == fetch.ATTEMPTS
    assert len(pauses) == capsys.readouterr().err.count("HTTP 503") == fetch.ATTEMPTS - 1
    shares = [pause / min(2**i, 60) for i, pause in enumerate(pauses)]
    assert all(0.5 <= share <= 1 for share in shares) and len(set(shares)) > 1


def test_attempts_count_only_without_new_bytes(site, tmp_path):
    site.faults = [{"cut": 100_000}] * (2 * fetch.ATTEMPTS)
    fetched(site, tmp_path / "x")
    assert len(site.requests) == 2 * fetch.ATTEMPTS + 1


def test_server_without_ranges_that_always_fails_is_an_error(site, tmp_path):
    site.ranges, site.faults = False, [{"cut": HALF}] * 99
    with pytest.raises(RecipeError, match="ended at 1,500,000 of 3,000,000 bytes"):
        fetched(site, tmp_path / "x")
    assert len(site.requests) == fetch.ATTEMPTS


def test_refused_connection_is_retried_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://127.0.0.1:{free.getsockname()[1]}/x"
        with pytest.raises(RecipeError, match=r"Connection refused.*Check the network"):
            fetch.fetch(url, tmp_path / "x", pause=0.001)
    assert capsys.readouterr().err.count("next attempt in") == fetch.ATTEMPTS - 1


def test_short_content_is_not_complete(site, tmp_path):
    site.faults = [{"cut": len(CONTENT) - 1}]
    fetched(site, tmp_path / "x")
    assert ranges(site)[1] == f"bytes={len(CONTENT) - 1}-"


def test_chunked_answer_is_complete(site, tmp_path):
    site.chunked, site.faults = True, [{"cut": HALF}]
    fetched(site, tmp_path / "x")
    assert ranges(site) == [None, f"bytes={HALF}-"]


def test_answer_without_size_needs_a_hash_or_a_size(site, tmp_path):
    site.tells_length = False
    with pytest.raises(RecipeError, match="does not tell the size.*sha256"):
        fetched(site, tmp_path / "x")
    fetched(site, tmp_path / "x", sha256=sha256(CONTENT))
    (tmp_path / "x").unlink()
    site.faults = [{"cut": HALF}]
    fetched(site, tmp_path / "x", bytes=len(CONTENT))


# -------------------------------------------------------------------------- only what belongs together


def test_server_that_ignores_ranges_sends_all_again(site, tmp_path):
    site.ranges, site.faults = False, [{"cut": HALF}]
    fetched(site, tmp_path / "x")
    assert [status for *_, status, _ in site.requests] == [200, 200]


@pytest.mark.parametrize("heeds_if_range", [True, False])
def test_file_that_changes_midway_is_downloaded_again(site, tmp_path, heeds_if_range):
    site.heeds_if_range = heeds_if_range
    site.faults = [{"cut": HALF}, {"content": OTHER, "etag": '"two"'}]
    assert fetched(site, tmp_path / "x")["version"] == '"two"'
    assert ranges(site)[1] == f"bytes={HALF}-"


def test_changed_date_is_noticed_without_an_etag(site, tmp_path):
    site.etag, site.modified = "", "Mon, 01 Jan 2024 00:00:00 GMT"
    site.faults = [{"cut": HALF}, {"content": OTHER, "modified": "Tue, 02 Jan 2024 00:00:00 GMT"}]
    fetched(site, tmp_path / "x")
    assert [status for *_, status, _ in site.requests] == [200, 200]


def test_part_of_an_unknown_version_is_not_resumed(site, tmp_path):
    site.etag = ""
    site.faults = [{"cut": HALF}, {"content": OTHER}]
    fetched(site, tmp_path / "x")
    assert ranges(site) == [None, None]


def test_part_of_an_unknown_version_is_resumed_with_a_hash(site, tmp_path):
    site.etag = 'W/"weak"'
    site.faults = [{"cut": HALF}]
    fetched(site, tmp_path / "x", sha256=sha256(CONTENT))
    assert ranges(site) == [None, f"bytes={HALF}-"]


def test_file_that_became_shorter_than_the_part(site, tmp_path):
    site.heeds_if_range = False
    site.faults = [{"cut": HALF}, {"content": OTHER[:1000], "etag": '"two"'}]
    fetched(site, tmp_path / "x")
    assert [status for *_, status, _ in site.requests] == [200, 416, 200]


def test_answer_to_another_range_is_not_used(site, tmp_path):
    wrong = {"Content-Range": f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}"}
    site.faults = [{"cut": HALF}, {"status": 206, "headers": wrong}]
    fetched(site, tmp_path / "x")
    assert ranges(site) == [None, f"bytes={HALF}-", None]


def test_part_from_another_url_is_not_used(site, tmp_path):
    (tmp_path / "x.part").write_bytes(OTHER[:HALF])
    state = {"url": "http://127.0.0.1/else", "bytes": len(OTHER), "etag": site.etag, "last_modified": ""}
    (tmp_path / ".x.json").write_text(json.dumps(state))
    fetched(site, tmp_path / "x")
    assert ranges(site) == [None]


# ----------------------------------------------------------------------------------- what is never kept


@pytest.mark.parametrize("name", ["sha256", "sha1", "md5"])
def test_altered_byte_is_refused_and_removed(site, tmp_path, name):
    site.content = CONTENT[:HALF] + bytes([CONTENT[HALF] ^ 1]) + CONTENT[HALF + 1 :]
    pin = hashlib.new(name, CONTENT).hexdigest()
    with pytest.raises(RecipeError, match=f"{name} .*, expected {pin}.*changed"):
        fetched(site, tmp_path / "x", **{name: pin})
    assert not list(tmp_path.iterdir()) and len(site.requests) == 1
    site.content = CONTENT
    fetched(site, tmp_path / "x", **{name: pin.upper()})


@pytest.mark.parametrize("pins", [{}, {"sha256": sha256(CONTENT)}], ids=["no hash", "a hash"])
def test_a_login_page_is_named_and_removed(site, tmp_path, pins):
    site.content = b"<!doctype HTML>\n<html><body>Log in</body></html>"
    with pytest.raises(RecipeError, match=r"text\.bin sent: an HTML page and no data: probably a login"):
        fetch.fetch(site.url, tmp_path / "x.gz", pause=0.001, **pins)
    assert list(tmp_path.iterdir()) == []
    fetch.fetch(site.url, tmp_path / "x.html", pause=0.001)


def test_damaged_part_is_discarded_once(site, tmp_path):
    site.faults = [{"cut": HALF}] + [{"status": 503}] * (fetch.ATTEMPTS - 1)
    with pytest.raises(RecipeError):
        fetched(site, tmp_path / "x", sha256=sha256(CONTENT))
    damaged = bytearray((tmp_path / "x.part").read_bytes())
    damaged[1000] ^= 1
    (tmp_path / "x.part").write_bytes(damaged)
    site.requests.clear()
    site.faults = []
    fetched(site, tmp_path / "x", sha256=sha256(CONTENT))
    assert ranges(site) == [f"bytes={HALF}-", None]


@pytest.mark.parametrize("expected", [len(CONTENT) - 1, len(CONTENT) + 1])
def test_another_size_than_pinned_is_refused_before_the_download(site, tmp_path, expected):
    with pytest.raises(RecipeError, match=f"has 3,000,000 bytes, expected {expected:,}"):
        fetched(site, tmp_path / "x", bytes=expected)
    assert not list(tmp_path.iterdir()) and len(site.requests) == 1


def test_content_that_does_not_end_at_the_pinned_size_is_refused(site, tmp_path):
    site.tells_length = False
    with pytest.raises(RecipeError, match="more than the expected 2,000,000 bytes"):
        fetched(site, tmp_path / "x", bytes=2_000_000)
    assert not list(tmp_path.iterdir()) and len(site.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 204])
def test_permanent_status_is_not_retried(site, tmp_path, status):
    site.faults = [{"status": status}] * 2
    with pytest.raises(RecipeError, match=rf"{site.url}: HTTP {status}"):
        fetched(site, tmp_path / "x")
    assert len(site.requests) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "url",
    ["file:///etc/hostname", "ftp://127.0.0.1/x", "/etc/hostname", "data:,x", "http:///x", "http://h/ x"],
)
def test_only_http_is_fetched(tmp_path, url):
    with pytest.raises(Refused, match="expected a URL that starts with http"):
        fetch.fetch(url, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x"])
def test_redirect_to_another_scheme_is_refused(site, tmp_path, to):
    site.moved["/text.bin"] = to
    with pytest.raises(RecipeError, match="(?i)redirect"):
        fetched(site, tmp_path / "x")
    assert len(site.requests) == 1 and not list(tmp_path.iterdir())


def test_redirect_is_followed_with_the_range(site, tmp_path):
    site.moved["/text.bin"] = "/elsewhere"
    site.faults = [{}, {"cut": HALF}]
    fetched(site, tmp_path / "x")
    assert ranges(site) == [None, None, f"bytes={HALF}-", f"bytes={HALF}-"]


def test_redirect_from_https_to_http_is_refused():
    request = fetch.urllib.request.Request("https://example.org/x")
    with pytest.raises(RecipeError, match="expected https"):
        fetch._Redirects().redirect_request(request, None, 302, "Found", {}, "http://example.org/x")


def test_redirects_in_a_circle_end(site, tmp_path):
    site.moved["/text.bin"] = "/text.bin"
    with pytest.raises(RecipeError, match="HTTP 302"):
        fetched(site, tmp_path / "x")
    assert len(site.requests) < 20


# -------------------------------------------------------------------------------------------------- disk


def test_file_larger_than_the_disk_is_refused_before_the_download(site, tmp_path):
    site.claims = 10**18
    with pytest.raises(Refused, match=rf"{tmp_path}: x needs {10**18:,} bytes, and [\d,]+ bytes are free"):
        fetched(site, tmp_path / "x")
    assert (tmp_path / "x.part").stat().st_size == 0 and len(site.requests) == 1


def test_full_disk_is_named(site, tmp_path):
    (tmp_path / "x.part").symlink_to("/dev/full")  # every write to it fails as on a full disk
    with pytest.raises(RecipeError, match=r"x\.part: No space left on device: 3,000,000 bytes .* free"):
        fetched(site, tmp_path / "x")
    assert len(site.requests) == 1


FETCH = """
import resource, sys
from pathlib import Path
from recipe.corpus import fetch
from recipe.project import RecipeError
if int(sys.argv[3]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    fetch.fetch(sys.argv[1], Path(sys.argv[2]))
except RecipeError as error:
    sys.exit(f"refused: {error}")
"""


def start(site, target, limit=0):
    command = [sys.executable, "-c", FETCH, site.url, str(target), str(limit)]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_download_continues_after_a_full_disk(site, tmp_path):
    _, said = start(site, tmp_path / "x", limit=HALF).communicate(timeout=60)
    assert "refused:" in said and f"{HALF:,} bytes are still missing" in said
    assert (tmp_path / "x.part").stat().st_size == HALF
    fetched(site, tmp_path / "x")
    assert ranges(site) == [None, f"bytes={HALF}-"]


# ------------------------------------------------------------------------------------------------- kills


def test_killed_download_is_resumed(site, tmp_path):
    part, reached = tmp_path / "x.part", 0
    for expected in (500_000, 1_200_000, 2_000_000):
        site.pause = 0.01
        child = start(site, tmp_path / "x")
        ends = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size >= expected):
            assert time.monotonic() < ends and child.poll() is None, "the download did not get there"
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert not (tmp_path / "x").exists()
        assert site.requests[-1][1] == (f"bytes={reached}-" if reached else None)
        reached = part.stat().st_size
    site.pause = 0.0
    fetched(site, tmp_path / "x")
    assert site.requests[-1] == ["GET", f"bytes={reached}-", 206, len(CONTENT) - reached]


def test_killed_before_the_rename_nothing_is_requested_again(site, tmp_path):
    fetched(site, tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "x.part")
    site.requests.clear()
    fetched(site, tmp_path / "x")
    assert not site.requests
    fetched(site, tmp_path / "x")  # and one that is there is checked, not fetched
    assert not site.requests
    (tmp_path / "x").write_bytes(OTHER)
    fetched(site, tmp_path / "x")
    assert len(site.requests) == 1


def test_damaged_state_file_starts_again(site, tmp_path):
    (tmp_path / "x.part").write_bytes(OTHER[:HALF])
    (tmp_path / ".x.json").write_text('{"url": "htt')
    fetched(site, tmp_path / "x")
    assert ranges(site) == [None]


def test_memory_does_not_grow_with_the_file(site, tmp_path):
    site.content = bytes(64 << 20)
    pin = sha256(site.content)
    tracemalloc.start()
    fetch.fetch(site.url, tmp_path / "x", sha256=pin)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20


# ----------------------------------------------------------------------------------------------- sources


def test_source_of_several_urls_continues_with_the_failed_one(site, tmp_path):
    urls = [site.url.replace("text.bin", f"{i}.txt") for i in range(3)]
    spec = {"source": "files", "url": urls, "sha256": [sha256(CONTENT), None, sha256(CONTENT)]}
    site.faults = [{}, {"status": 404}]
    with pytest.raises(RecipeError, match=r"1\.txt: HTTP 404"):
        download.download("s", spec, tmp_path)
    assert not (tmp_path / "s/source.json").exists()
    record = download.download("s", spec, tmp_path)
    assert len(site.requests) == 4  # the first file was not asked for again
    assert [f["url"] for f in record["files"].values()] == urls
    assert {f["sha256"] for f in record["files"].values()} == {sha256(CONTENT)}
    assert download.download("s", spec, tmp_path) == record and len(site.requests) == 4
    # A hash that is pinned later costs no download; a file that is no longer expected goes.
    pinned = {"source": "files", "url": urls[1], "md5": hashlib.md5(CONTENT).hexdigest()}
    assert list(download.download("s", pinned, tmp_path)["files"]) == ["1.txt"]
    assert len(site.requests) == 4
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [".1.txt.json", "1.txt", "source.json"]


def test_space_for_all_sources_is_checked_before_the_first(site, tmp_path):
    specs = {name: {"source": "files", "url": site.url.replace("text", name)} for name in ("a", "b")}
    assert sum(download.missing_bytes(n, s, tmp_path) for n, s in specs.items()) == 2 * len(CONTENT)
    site.moved["/a.bin"] = "/elsewhere"
    assert download.missing_bytes("a", specs["a"], tmp_path) == len(CONTENT)
    assert {method for method, *_ in site.requests} == {"HEAD"}  # also after the redirect
    site.moved.clear()
    download.download("a", specs["a"], tmp_path)
    assert download.missing_bytes("a", specs["a"], tmp_path) == 0
    more = {"source": "files", "url": [specs["a"]["url"], specs["b"]["url"]]}
    assert download.missing_bytes("a", more, tmp_path) == len(CONTENT)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/b.bin.part").write_bytes(CONTENT[:HALF])
    assert download.missing_bytes("b", specs["b"], tmp_path) == HALF
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(Refused, match=rf"b/c: all needs {free * 2:,} bytes, and"):
        fetch.require_space(tmp_path / "b/c", free * 2, "all")
    fetch.require_space(tmp_path / "b/c", 1, "all")


def test_stopped_stage_resumes_its_file(site, make_project):
    project = make_project()
    spec = {"source": "files", "url": site.url.replace(".bin", ".txt"), "sha256": sha256(CONTENT)}
    project.edit("mini", "dataset", sources={"web": spec})
    project.environment["no_proxy"] = "127.0.0.1"
    site.pause = 0.02
    child = project.start("pretrain/01_download.py", "--recipe", "mini")
    part = project.folder / "data/web/text.txt.part"
    ends = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 500_000):
        assert time.monotonic() < ends and child.poll() is None, "the download did not get there"
        time.sleep(0.01)
    child.terminate()
    said, _ = child.communicate()
    assert child.returncode == 143 and "Run the same command again" in said
    have = part.stat().st_size
    site.pause = 0.0
    project.run("pretrain/01_download.py", "--recipe", "mini")
    assert site.requests[-1] == ["GET", f"bytes={have}-", 206, len(CONTENT) - have]
    (file,) = project.figures("mini", "01_download")["sources"]["web"]["files"].values()
    assert (file["sha256"], file["version"]) == (sha256(CONTENT), '"one"')
    site.claims, site.content = 10**18, OTHER
    project.edit("mini", "dataset", sources={"web": {"source": "files", "url": site.url}})
    refused = project.run("pretrain/01_download.py", "--recipe", "mini", "--force", check=False)
    assert refused.returncode == 2 and f"downloading needs {10**18:,} bytes" in refused.stderr
    assert site.requests[-1][0] == "HEAD"
