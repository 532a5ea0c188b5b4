"""Download a file by http: it is resumed, retried and checked; memory is about a megabyte.

Until it is complete and its hash or size is right, a download is in ``<target>.part``, and what the server
told about it in ``.<target>.json``. After a kill at any moment, the next call resumes it, if the server still
has the same file.
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import http.client
import os
import random
import re
import ssl
import string
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipe.corpus.web_pages import refuse_web_page
from recipe.progress import byte_progress
from recipe.project import (
    NO_SPACE,
    RecipeError,
    Refused,
    digest_of,
    disk_of,
    free_bytes,
    read_state,
    require_space,
    write_json,
)

# Key of a source, or parameter of `fetch`: the number of hexadecimal digits.
HASHES = {"sha256": 64, "sha1": 40, "md5": 32}
# Attempts in a row without any new byte; the pauses between them add up to one or two minutes.
ATTEMPTS = 8
LONGEST_PAUSE = 60.0  # seconds between two attempts
LONGEST_RETRY_AFTER = 600.0  # seconds; if the server asks for more, the download fails


class _Temporary(Exception):
    """A failure of the network or the server that may be temporary.

    wait: the seconds that the server asks to wait. stale: the .part belongs to another version of the file.
    """

    def __init__(self, reason: object, wait: float = 0.0, stale: bool = False) -> None:
        super().__init__(str(reason) or type(reason).__name__)
        self.wait = wait
        self.stale = stale


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only, and never from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        to = urllib.parse.urlsplit(newurl).scheme
        if to not in ("http", "https") or (req.type, to) == ("https", "http"):
            raise RecipeError(f"{req.full_url}: redirects to {newurl}: refused, expected {req.type}")
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None:
            new.method = req.get_method()  # HEAD stays HEAD
        fp.close()  # the body of a redirect is not needed, and it may never end
        return new


_OPENER = urllib.request.build_opener(_Redirects)


def fetch(
    url: str,
    target: Path,
    sha256: str | None = None,
    bytes: int | None = None,
    sha1: str | None = None,
    md5: str | None = None,
    timeout: float = 60.0,
    pause: float = 1.0,
) -> dict[str, Any]:
    """Download one file by http or https to `target`; return its url, bytes, sha256 and version.

    The version is the server's ETag or Last-Modified, or an empty string. The content is written to
    ``<target>.part``, checked on the disk, flushed and renamed. The given hashes and the size in `bytes` are
    checked; without them, the size that the server announced. What the server told about the file is kept in
    ``.<target>.json``: after a kill at any moment, the same call requests only the missing range, and only of
    the same version (If-Range), or checks the file that is complete already.

    A refused or lost connection, a stall of `timeout` seconds, incomplete content, and HTTP 408, 425, 429 and
    5xx are retried, up to ATTEMPTS times in a row without any new byte. The first pause is about `pause`
    seconds and each next one twice as long (with jitter), or what Retry-After asks for. Memory is constant.

    Raises RecipeError for another HTTP status, a redirect to another scheme, too many attempts or a full disk
    (the .part is kept), and for another size or hash than expected, or an HTML page in place of data (the
    .part is deleted).
    """
    _require_http(url)
    pins = {key: value.lower() for key, value in (("sha256", sha256), ("sha1", sha1), ("md5", md5)) if value}
    part, state = part_of(target), _read_state(target, url)
    known = pins or ({"sha256": state["sha256"]} if "sha256" in state else {})
    if target.is_file() and known:
        digest, difference = _check(target, known, bytes)
        if not difference:
            return _facts(url, target, digest, state)
    for last in (False, True):
        resumed = _receive_all(url, target, pins, bytes, timeout, pause)
        digest, difference = _check(part, pins, bytes)
        if not difference:
            break
        _refuse_login_page(url, target)
        _forget(target)
        if last or not resumed:
            raise RecipeError(
                f"{target}: {url} sent {difference}. It was changed on the way, or the publisher has "
                "replaced the file: compare with the publisher's list, correct dataset.json, and run again"
            )
        _warn(f"{target.name}: {difference}; a part of it was from an earlier attempt: starts again")
    if not pins:
        _refuse_login_page(url, target)
    state = _read_state(target, url)
    facts = _facts(url, part, digest, state)
    write_json(_state_path(target), state | facts)
    with part.open("rb") as handle:
        os.fsync(handle.fileno())
    part.rename(target)
    return facts


def _refuse_login_page(url: str, target: Path) -> None:
    """Raise RecipeError, and delete the .part, if it is a web page and `target` is not named as one."""
    if target.suffix in (".html", ".htm"):
        return
    with part_of(target).open("rb") as handle:
        head = handle.read(4096)
    try:
        refuse_web_page(head, f"{target}: {url} sent")
    except RecipeError:
        _forget(target)
        raise


def _require_http(url: str) -> None:
    """Raise Refused unless `url` is plain http or https."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"[\s\x00-\x1f]", url):
        raise Refused(f"{url!r}: expected a URL that starts with http:// or https:// and has no white space")
    if "@" in parts.netloc:
        raise Refused(
            f"{parts.scheme}://…@{parts.hostname}: a password in a URL would be written into records. "
            "Download the file yourself and give its path in `paths`"
        )


def url_name(url: str) -> str:
    """The file name at the end of a URL. Raises Refused if it is empty or not safe to write."""
    _require_http(url)
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])
    safe = re.fullmatch(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]{0,79}", name)  # 80 letters: at most 240 bytes
    if not safe or name.endswith((".part", "source.json")):
        raise Refused(f"{url}: ends in {name!r}, which cannot become the name of a file here")
    return name


def part_of(target: Path) -> Path:
    """The path to which a file is written until it is complete."""
    return target.with_name(f"{target.name}.part")


def _state_path(target: Path) -> Path:
    """The path of the record of what the server told about a file."""
    return target.with_name(f".{target.name}.json")


def _read_state(target: Path, url: str) -> dict[str, Any]:
    """What the server told about the file when its download from this URL began; empty if not known."""
    state = read_state(_state_path(target), "url", "bytes", "etag", "last_modified")
    return state if state and state["url"] == url else {}


def _forget(target: Path) -> None:
    """Remove the .part and its record."""
    part_of(target).unlink(missing_ok=True)
    _state_path(target).unlink(missing_ok=True)


def _facts(url: str, path: Path, digest: str, state: dict[str, Any]) -> dict[str, Any]:
    """The record of a file that has been checked."""
    version = state.get("etag") or state.get("last_modified") or ""
    return {"url": url, "bytes": path.stat().st_size, "sha256": digest, "version": version}


def _check(path: Path, pins: dict[str, str], size: int | None) -> tuple[str, str]:
    """The sha256 of a file, and in words how its size and hashes differ from the expected ones, or ""."""
    found = path.stat().st_size
    digests = {algorithm: digest_of(path, algorithm) for algorithm in {"sha256", *pins}}
    difference = f"{found:,} bytes, expected {size:,}" if size not in (None, found) else ""
    for algorithm, expected in pins.items():
        if digests[algorithm] != expected:
            difference = f"{found:,} bytes that have {algorithm} {digests[algorithm]}, expected {expected}"
    return digests["sha256"], difference


def _receive_all(
    url: str, target: Path, pins: dict[str, str], size: int | None, timeout: float, pause: float
) -> bool:
    """Fill the .part, with retries. True when a part of it is from an earlier attempt."""
    part = part_of(target)
    state = _read_state(target, url)
    furthest = part.stat().st_size if part.exists() else 0
    if state and state["bytes"] == furthest and part.exists():
        return True  # the earlier attempt was killed between the last byte and the check
    failures = 0
    while True:
        try:
            return _receive(url, target, pins, size, timeout)
        except _Temporary as error:
            if error.stale:
                _forget(target)
            have = part.stat().st_size if part.exists() else 0
            failures = 1 if have > furthest else failures + 1
            furthest = max(furthest, have)
            if failures == ATTEMPTS or error.wait > LONGEST_RETRY_AFTER:
                asked = f"; the server asks to wait {error.wait:,.0f} s" if error.wait else ""
                raise RecipeError(
                    f"{target}: {url} cannot be downloaded: {error}{asked}. {have:,} bytes are kept. "
                    "Check the network (proxy, DNS) and run again: it continues from there. Or remove the "
                    "source from dataset.json and its pairs from instruction.json"
                ) from error
            backoff = min(pause * 2 ** (failures - 1), LONGEST_PAUSE) * random.uniform(0.5, 1.0)
            seconds = max(error.wait, backoff)
            _warn(f"{target.name}: {error}; {have:,} bytes are kept; next attempt in {seconds:.1f} s")
            time.sleep(seconds)


def _receive(url: str, target: Path, pins: dict[str, str], size: int | None, timeout: float) -> bool:
    """Send one request and write the answer to the .part. True when it continues an earlier attempt.

    Raises _Temporary, RecipeError as `fetch` does, and OSError of the disk.
    """
    part, state = part_of(target), _read_state(target, url)
    headers = _range_headers(part, state, pins)
    with _open(url, timeout, headers) as response:
        resumed = response.status == 206
        have = part.stat().st_size if resumed else 0
        if resumed and not (headers and _continues(response.headers, have, state)):
            raise _Temporary("the server has another version of the file now", stale=True)
        total = _total(response, have)
        if size is not None and total not in (None, size):
            _forget(target)
            raise RecipeError(f"{target}: {url} has {total:,} bytes, expected {size:,}: another version")
        if total is None:
            total = state.get("bytes") if resumed else size
        if total is None and not pins and not response.chunked:
            raise RecipeError(
                f"{target}: {url}: the server does not tell the size, so that an incomplete download "
                "cannot be noticed. Give the `sha256` of the file"
            )
        with _room_for(target, total), part.open("ab" if resumed else "wb") as out:
            if not resumed:
                state = {"url": url, "bytes": total, "etag": response.headers.get("ETag", "")}
                state["last_modified"] = response.headers.get("Last-Modified", "")
                # After the old part is emptied, before a new byte is written.
                write_json(_state_path(target), state)
            require_space(part.parent, (total or have) - have, target.name)
            for block in byte_progress(_blocks(response), target.name, total, have):
                out.write(block)
                have += len(block)
                if size is not None and have > size:
                    _forget(target)
                    raise RecipeError(f"{target}: {url} has more than the expected {size:,} bytes")
    if total is not None and have < total:
        raise _Temporary(f"the connection ended at {have:,} of {total:,} bytes")
    write_json(_state_path(target), state | {"bytes": have})
    return resumed


def _range_headers(part: Path, state: dict[str, Any], pins: dict[str, str]) -> dict[str, str]:
    """Headers that request the rest of a file; none if it is unknown whether the .part is of this version.

    A strong ETag or a date protects against another version (RFC 9110, 13.1.5). If the server gives neither,
    a hash of the complete file is needed.
    """
    have = part.stat().st_size if part.exists() else 0
    if not have or not state:
        return {}
    etag = state["etag"] if not state["etag"].startswith("W/") else ""
    version = etag or state["last_modified"]
    if not version:
        return {"Range": f"bytes={have}-"} if pins else {}
    return {"Range": f"bytes={have}-", "If-Range": version}


def _continues(headers: Any, have: int, state: dict[str, Any]) -> bool:
    """True when a partial answer begins where the .part ends and is of the same version.

    This is checked because not every server respects If-Range.
    """
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
    if not span or int(span[1]) != have:
        return False
    if state["bytes"] is not None and span[2] not in ("*", str(state["bytes"])):
        return False
    seen = {"etag": headers.get("ETag"), "last_modified": headers.get("Last-Modified")}
    return all(value in (None, state[key]) for key, value in seen.items())


def _total(response: http.client.HTTPResponse, have: int) -> int | None:
    """The size of the complete file, or None if the answer does not tell it."""
    length = response.headers.get("Content-Length", "")
    return have + int(length) if length.isdecimal() else None


@contextlib.contextmanager
def _room_for(target: Path, total: int | None) -> Iterator[None]:
    """Turn a full disk, quota or limit of the file size into a RecipeError with the bytes needed and free."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        part = part_of(target)
        have = part.stat().st_size if part.exists() else 0
        needed = f"{total - have:,}" if total is not None else "an unknown number of"
        raise RecipeError(
            f"{part}: {error.strerror}: {needed} bytes are still missing, {free_bytes(part.parent):,} "
            f"are free on the disk mounted at {disk_of(part.parent)}. {have:,} bytes are kept: free some "
            "space and run again, and it continues from there"
        ) from error


def _open(
    url: str, timeout: float, headers: dict[str, str] | None = None, method: str = "GET"
) -> http.client.HTTPResponse:
    """The server's answer, 200 or 206. Raises _Temporary for what may be temporary, otherwise RecipeError."""
    request = urllib.request.Request(
        urllib.parse.quote(url, safe=string.punctuation),  # a URL may hold Japanese letters
        headers={"User-Agent": "recipe/0.1 (urllib)", "Accept-Encoding": "identity"} | (headers or {}),
        method=method,
    )
    try:
        response = _OPENER.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        reason = f"HTTP {error.code} {error.reason}"
        if error.code == 416:  # range not satisfiable: the file is shorter than the .part
            raise _Temporary(reason, stale=True) from error
        if error.code in (408, 425, 429) or error.code >= 500:
            raise _Temporary(reason, _retry_after(error.headers)) from error
        raise RecipeError(
            f"{url}: {reason}. A retry does not help: check that the address in dataset.json is still "
            "right and that it needs no login. Or download the file yourself and give its path in `paths`"
        ) from error
    except http.client.InvalidURL as error:
        raise Refused(f"{url}: not a valid URL ({error})") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise RecipeError(
                f"{url}: the server's certificate is not trusted ({reason.verify_message}). Set the clock, "
                "install the system's ca-certificates, or set SSL_CERT_FILE to your proxy's"
            ) from error
        raise _Temporary(reason) from error
    if response.status not in (200, 206):
        response.close()
        raise RecipeError(f"{url}: HTTP {response.status} {response.reason}, expected 200 OK")
    return response


def _retry_after(headers: Any) -> float:
    """The seconds that Retry-After asks for, given as a number or as a date; 0 without that header."""
    value = headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
        return max((date - datetime.datetime.now(datetime.UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):  # TypeError: a date without a time zone
        return 0.0


def _blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The content as it arrives, in blocks of at most 256 KiB. Raises _Temporary if the connection fails."""
    while True:
        try:
            # read() would lose what came before the connection was lost.
            block = response.read1(1 << 18)
        except (OSError, http.client.HTTPException) as error:
            raise _Temporary(error) from error
        if not block:
            return
        yield block


def announced_size(url: str) -> int:
    """The size in bytes that the server announces before a download; 0 if it does not."""
    try:
        with _open(url, 20.0, method="HEAD") as response:
            return _total(response, 0) or 0
    except (_Temporary, RecipeError):
        return 0


def _warn(message: str) -> None:
    print(f"download: {message}", file=sys.stderr, flush=True)
