"""The files of a source: a user's own ``paths``, or what stage 01 downloads from ``url``."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from recipe.corpus.fetch import HASHES, url_name
from recipe.project import ROOT, RecipeError, Refused, digest_of, glob_files, user_path


def is_own(spec: dict[str, Any]) -> bool:
    """Whether a source is a user's own files, which stay where they are."""
    return "paths" in spec or "path" in spec or local_data_set(spec) is not None


def local_data_set(spec: dict[str, Any]) -> Path | None:
    """The folder of a `dataset` that is on this machine; None for one of the hub, and for other entries."""
    folder = user_path(spec["dataset"]) if "dataset" in spec else None
    return folder if folder and folder.is_dir() else None


def own_files(name: str, spec: dict[str, Any]) -> list[Path]:
    """The files of a source that `is_own`, sorted. Raises RecipeError when a pattern matches none."""
    if folder := local_data_set(spec):
        return files_below(folder)
    if "paths" in spec:
        return expand_paths(name, spec["paths"])
    folder = user_path(spec["path"])
    if not (found := files_below(folder)):
        raise RecipeError(
            f"dataset.json: sources.{name}.path: {folder} is no folder with files. Give a folder that "
            "save_to_disk of `datasets` wrote"
        )
    return found


def files_below(folder: Path) -> list[Path]:
    """The files of a data set's folder, sorted; without hidden ones, such as those of git."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not is_hidden(path, folder))


def is_hidden(path: Path, folder: Path) -> bool:
    """Whether a file of a data set's folder is no part of it, as `datasets` decides by names."""
    return any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)


def source_paths(name: str, spec: dict[str, Any], data: Path) -> list[Path]:
    """The files that a source is read from: those that ``paths`` matches, or those of ``url``, in its order.

    data: the folder that stage 01 downloads to.
    """
    if "paths" in spec:
        return expand_paths(name, spec["paths"])
    return [data / name / url_name(url) for url, _ in pinned_urls(name, spec)]


def file_facts(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Size and time of change of a user's own files: if they change, stages that read them become stale.

    The paths begin at the project's folder, so that it can be moved; only files outside it have whole paths.
    """
    return {path_below_root(p): {"bytes": p.stat().st_size, "mtime_ns": p.stat().st_mtime_ns} for p in paths}


def path_below_root(path: Path | str) -> str:
    """A path from the project's folder where it is below it, else the whole path."""
    return str(path).removeprefix(f"{ROOT}/")


def is_file_facts(value: Any) -> bool:
    """Whether a value of a record is what `file_facts` says of one file."""
    return isinstance(value, dict) and {"bytes", "mtime_ns"} <= value.keys()


def with_hashes(facts: Any) -> Any:
    """The same facts, in which each file that `file_facts` describes also has its sha256."""
    if not isinstance(facts, dict):
        return facts
    return {
        key: value | {"sha256": hash_of_file(ROOT / key)} if is_file_facts(value) else with_hashes(value)
        for key, value in facts.items()
    }


def is_same_file(path: str, recorded: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a file is the recorded one: by size and time, or, for a copy, by size and sha256."""
    if recorded["bytes"] != now["bytes"]:
        return False
    if recorded["mtime_ns"] == now["mtime_ns"]:
        return True
    return "sha256" in recorded and recorded["sha256"] == hash_of_file(ROOT / path)


def hash_of_file(path: Path) -> str:
    """The sha256 of a file, computed once for each time of its change."""
    return _hash(path, path.stat().st_size, path.stat().st_mtime_ns)


@functools.cache
def _hash(path: Path, size: int, mtime_ns: int) -> str:
    return digest_of(path)


def expand_paths(name: str, patterns: list[str]) -> list[Path]:
    """The files that the globs in ``paths`` match, sorted.

    Raises RecipeError when one matches nothing, and for a match that is no file: a folder (unless the pattern
    has ``**``), a link to nothing, a fifo.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matches = [p for p in glob_files(pattern) if not ("**" in pattern and p.is_dir())]
        for path in matches:
            if not path.is_file():
                kind = (
                    "a folder" if path.is_dir() else "a link to nothing" if path.is_symlink() else "no file"
                )
                raise RecipeError(
                    f"dataset.json: sources.{name}: {path} is {kind}, and {pattern!r} matches it. Name only "
                    "files: move it away, or write a pattern such as my_text/*.txt (in subfolders, too: "
                    "my_text/**/*.txt)"
                )
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


def pinned_urls(name: str, spec: dict[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """The URLs of a source, each with its hashes: ``[(url, {"sha256": ...}), ...]``.

    ``url`` is one string or a list. ``sha256``, ``sha1`` and ``md5`` have the same shape (null: no hash).
    Raises Refused for an invalid URL or hash, and for two URLs that end in the same file name.
    """
    here = f"dataset.json: sources.{name}"
    urls = spec["url"] if isinstance(spec["url"], list) else [spec["url"]]
    pins: list[dict[str, str]] = [{} for _ in urls]
    seen: dict[str, str] = {}
    for url in urls:
        if not isinstance(url, str):
            raise Refused(f"{here}.url: {url!r}, expected a string or a list of strings")
        other = seen.setdefault(url_name(url), url)
        if urls.count(url) > 1 or other != url:
            raise Refused(f"{here}.url: {other} and {url} would both become {url_name(url)}. Keep one")
    for key, digits in HASHES.items():
        if key not in spec:
            continue
        values = spec[key] if isinstance(spec[key], list) else [spec[key]]
        if isinstance(spec[key], list) != isinstance(spec["url"], list) or len(values) != len(urls):
            raise Refused(
                f"{here}.{key}: expected one for each of the {len(urls)} in `url`, in the same shape"
            )
        for pin, value in zip(pins, values, strict=True):
            if value is None:
                continue
            if not isinstance(value, str) or not re.fullmatch(rf"[0-9a-fA-F]{{{digits}}}", value):
                raise Refused(f"{here}.{key}: {value!r}, expected {digits} hexadecimal digits")
            pin[key] = value.lower()
    return list(zip(urls, pins, strict=True))
