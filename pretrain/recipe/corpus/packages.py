"""Debian packages by apt, and source distributions by the package index: nothing is installed or run."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
from pathlib import Path

from recipe.corpus.fetch import fetch
from recipe.project import RecipeError


def require_apt(name: str) -> None:
    """Raise RecipeError, with what to do, on a system without Debian's package tools."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise RecipeError(
            f"dataset.json: sources.{name} is downloaded as a Debian package, but this system has no apt-get "
            "and dpkg-deb. Run on Debian or Ubuntu (Windows: WSL; other systems: the Dockerfile), or use "
            'your own text: "sources": {"my-text": {"source": "files", "paths": ["my_text/*.txt"]}} and, in '
            'instruction.json, "pairs": {} (README: My own text)'
        )


def download_packages(name: str, packages: list[str], folder: Path, data: Path) -> None:
    """Download Debian packages to `folder` with apt. Raises RecipeError with the end of what apt says.

    apt keeps its lists in ``data/.apt`` and needs no root. It checks every file against the signed release of
    the system's own sources.
    """
    _run(name, [*_updated_apt(name, folder, data), "download", *packages], folder)


def download_descriptions(name: str, folder: Path, data: Path) -> None:
    """Copy apt's lists of Japanese package descriptions to `folder`; otherwise as `download_packages`."""
    _updated_apt(name, folder, data)
    lists = sorted((data / ".apt/lists").glob("*_i18n_Translation-ja"))
    if not lists:
        raise RecipeError(
            f"sources.{name}: apt has no Japanese package descriptions on this system. Check the network and "
            "the sources in /etc/apt, or remove this source from dataset.json"
        )
    for path in lists:
        shutil.copy(path, folder / path.name)


def _updated_apt(name: str, folder: Path, data: Path) -> list[str]:
    """The apt-get command with its private lists, which have just been updated."""
    require_apt(name)
    state = (data / ".apt").resolve()
    for part in ("lists/partial", "cache/archives/partial"):
        (state / part).mkdir(parents=True, exist_ok=True)
    apt = ["apt-get", "-q", "-o", f"Dir::State::lists={state}/lists", "-o", f"Dir::Cache={state}/cache"]
    apt += ["-o", "Acquire::Languages=ja", "-o", "Acquire::GzipIndexes=false", "-o", "Debug::NoLocking=1"]
    apt += ["-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3", "-o", "APT::Update::Error-Mode=any"]
    _run(name, [*apt, "update"], folder)
    return apt


def find_sdist(name: str, requirement: str) -> str:
    """The URL of a source distribution (``PROJECT==VERSION``) in the package index that pip is set up for.

    `pip download` is not used, because it would run the archive's setup.py; here it is only ever read. The
    index answers by PEP 503 (HTML) or PEP 691 (JSON). Raises RecipeError when the index does not have it.
    """
    project, version = requirement.split("==")
    page = f"{_package_index()}/{project}/"
    file = f"{project}-{version}.tar.gz"
    with tempfile.TemporaryDirectory() as folder:
        fetch(page, Path(folder) / "listing.html")
        listing = (Path(folder) / "listing.html").read_text("utf-8", "replace")
    # A link may be relative, without a folder; "filename": of PEP 691 is no link.
    target = rf"{re.escape(file)}(?:\?[^\"'#]*)?"
    link = re.search(rf"[\"']([^\"']*/{target})[\"'#]|href=[\"']({target})[\"'#]", listing)
    if not link:
        raise RecipeError(
            f"sources.{name}: the package index has no {file}. Use another index: PIP_INDEX_URL=URL"
        )
    return urllib.parse.urljoin(page, html.unescape(link[1] or link[2]))


def _package_index() -> str:
    """The URL of the package index that pip is set up for, or pip's default. Raises RecipeError without pip.

    pip runs in a process of its own: imported here, it would replace distutils, which torch.compile uses.
    """
    configured = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    default = [sys.executable, "-c", "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"]
    found = os.environ.get("PIP_INDEX_URL", "")
    for command in (configured, default):
        found = found or subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if not found:
        raise RecipeError(
            f"{sys.executable} has no pip, so its package index is not known. Name one: PIP_INDEX_URL=URL"
        )
    return found.rstrip("/")


def _run(name: str, command: list[str], cwd: Path) -> None:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, errors="replace")
    if result.returncode:
        tail = "\n  ".join((result.stderr.strip() or result.stdout.strip()).splitlines()[-6:])
        raise RecipeError(
            f"sources.{name}: `{command[0]} … {' '.join(command[-2:])}` failed with exit code "
            f"{result.returncode}:\n  {tail}\nCheck the network (proxy, DNS) and run again: complete "
            "downloads are kept. To go on without this source, remove it from dataset.json, and its pairs "
            "from instruction.json"
        )
