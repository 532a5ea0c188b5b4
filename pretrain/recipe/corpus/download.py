"""Stage 01: download the sources to ``data/<name>/``, and know later whether the data are still there.

Every file is checked (a hash, the size that the server announced, or apt's signed lists), written under
another name and renamed. Nothing is installed or run.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from recipe.corpus.fetch import HASHES, announced_size, fetch, part_of, url_name
from recipe.corpus.packages import download_descriptions, download_packages, find_sdist
from recipe.corpus.source_files import (
    file_facts,
    is_own,
    is_same_file,
    own_files,
    path_below_root,
    pinned_urls,
    with_hashes,
)
from recipe.corpus.sources import kind_of, licence
from recipe.project import ROOT, RecipeError, digest_of, fsync_tree, read_state, write_json


def download(name: str, spec: dict[str, Any], data: Path) -> dict[str, Any]:
    """Download one source to ``data/<name>/`` and return its record.

    The record holds the kind, the licence and for each file its bytes and sha256; for a file from a URL also
    the url and the version (ETag or Last-Modified). A user's own files stay where they are: their sizes and
    times of change are recorded. A data set of the hub has no files here, because it is streamed.

    A source that is complete for the same spec is kept, if its files still have their hashes. Otherwise an
    interrupted download of a URL continues where it was; packages are downloaded again. ``source.json`` is
    written last: it says that all files are there.

    Raises RecipeError, with what to do, when the source cannot be downloaded.
    """
    kind = kind_of(spec, f"dataset.json: sources.{name}")
    folder = data / name
    record = {"kind": spec["source"], "licence": licence(spec)}
    if is_own(spec):
        return record | {"files": with_hashes(file_facts(own_files(name, spec)))}
    if not kind.download:
        return record | {"files": {}}
    complete = _complete_record(spec, folder)
    if complete and all(digest_of(folder / f) == facts["sha256"] for f, facts in complete["files"].items()):
        return complete
    record |= {"spec": _downloaded_part(spec)}
    if kind.download.startswith("apt"):
        part = data / f".{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        if kind.download == "apt packages":
            download_packages(name, [*spec["packages"], *kind.tools], part, data)
        else:
            download_descriptions(name, part, data)
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
    if kind.download == "index":
        files = [(find_sdist(name, spec["requirement"]), {"sha256": spec["sha256"]})]
    else:
        files = pinned_urls(name, spec)
    record["files"] = {url_name(url): fetch(url, folder / url_name(url), **pins) for url, pins in files}
    _remove_former_files(folder, set(record["files"]))
    fsync_tree(folder)
    write_json(folder / "source.json", record)
    return record


def _remove_former_files(folder: Path, files: set[str]) -> None:
    """Remove the files of an earlier spec of the same source."""
    for state in folder.glob(".*.json"):
        former = state.name.removeprefix(".").removesuffix(".json")
        if former not in files:
            for path in (folder / former, folder / f"{former}.part", state):
                path.unlink(missing_ok=True)


def _downloaded_part(spec: dict[str, Any]) -> dict[str, Any]:
    """The part of a source's spec that decides what is downloaded."""
    return {key: spec[key] for key in ("source", "packages", "requirement", "url", *HASHES) if key in spec}


def _complete_record(spec: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """The record of a source if its files are complete for this spec, with the recorded sizes; else None."""
    record = read_state(folder / "source.json", "spec", "files")
    if not record:
        return None
    same = record["spec"] == _downloaded_part(spec) and all(
        (folder / file).is_file() and (folder / file).stat().st_size == facts["bytes"]
        for file, facts in record["files"].items()
    )
    return record if same else None


def missing_bytes(name: str, spec: dict[str, Any], data: Path) -> int:
    """The bytes that are still to be downloaded from a source's URLs, as far as the servers announce them.

    A server that does not answer counts as 0: `fetch` asks again, and checks the free space for each file.
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


def require_data(record: dict[str, Any], config: dict[str, Any], data: Path) -> None:
    """Raise RecipeError unless data/ still holds the files that stage 01 recorded for this recipe.

    record: the figures of stage 01. Another recipe may have replaced a source of the same name, or somebody
    may have emptied data/. Files are compared by their sizes, a user's own also by their times and hashes.
    """
    for name, spec in config["sources"].items():
        for file, facts in record["sources"][name]["files"].items():
            path = ROOT / file if is_own(spec) else data / name / file
            if not path.is_file() or path.stat().st_size != facts["bytes"]:
                raise RecipeError(
                    f"{path}: not the {facts['bytes']:,} bytes that stage 01 recorded. Download it again "
                    "with `bash run_all.sh --recipe NAME --to 01 --force`"
                )
            if "mtime_ns" in facts and not is_same_file(file, facts, *file_facts([path]).values()):
                raise RecipeError(
                    f"{path}: changed since stage 01 recorded it. Run "
                    "`bash run_all.sh --recipe NAME --from 01 --force`"
                )


def data_identity(figures: dict[str, Any]) -> dict[str, Any]:
    """What identifies the data that stage 01 recorded: equal data give an equal value, whenever it was
    downloaded.

    figures: those of stage 01. The value holds, for each source, its kind and for each of its files the size
    and the sha256 (in a record of an earlier release, the time of change of a user's own file). Addresses,
    versions of the server, licences and seconds are left out: they change nothing in the text.
    """
    return {
        name: {
            "kind": record["kind"],
            "files": {path_below_root(file): _identity(facts) for file, facts in record["files"].items()},
        }
        for name, record in figures["sources"].items()
    }


def _identity(facts: dict[str, Any]) -> dict[str, Any]:
    """What identifies one file in a record of stage 01."""
    keys = ("bytes", "sha256") if "sha256" in facts else ("bytes", "mtime_ns")
    return {key: facts[key] for key in keys if key in facts}


def former_identity(figures: dict[str, Any]) -> dict[str, Any]:
    """`data_identity` as earlier releases computed it: whole paths, and times of change, of own files."""
    keys = ("bytes", "sha256", "mtime_ns")
    identity: dict[str, Any] = {}
    for name, record in figures["sources"].items():
        files = {}
        for file, facts in record["files"].items():
            own = "mtime_ns" in facts
            files[str(ROOT / file) if own else file] = {
                key: facts[key] for key in keys if key in facts and not (own and key == "sha256")
            }
        identity[name] = {"kind": record["kind"], "files": files}
    return identity


def source_facts(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes and times of the user's own files: next to dataset.json, they make stage 01 stale.

    Raises RecipeError, before anything is downloaded, for paths that match nothing and for invalid URLs and
    hashes.
    """
    facts = {}
    for name, spec in config["dataset"]["sources"].items():
        if "url" in spec:
            pinned_urls(name, spec)
        elif is_own(spec):
            facts[name] = file_facts(own_files(name, spec))
    return facts
