"""Readers of the text that packages hold: manual pages, help pages, descriptions, and sentences of Tatoeba.

Each of the four has two functions. `read_manpages` and the like give its records as they are, and the
instruction pairs and tasks use them, too. `manpage_documents` and the like give the documents of a source:
they take the source's name, its entry in dataset.json and the folder that stage 01 downloads to.
"""

from __future__ import annotations

import gzip
import io
import itertools
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from recipe import host
from recipe.corpus.archives import REMEDY, gunzip, tar_members
from recipe.corpus.readers import Document
from recipe.project import RecipeError


class ManPage(NamedTuple):
    """A manual page. ``html`` is mandoc's rendering, or empty for a page that only names another one."""

    name: str
    section: str
    source: str
    html: str


def manpage_documents(name: str, spec: dict[str, Any], data: Path) -> Iterator[Document]:
    """A document for each manual page; one that only names another page is dropped as "redirect"."""
    for page in read_manpages(data / name):
        text = html_text(page.html) or page.source
        yield Document(f"{page.name}({page.section})", text, "" if page.html else "redirect")


def help_documents(name: str, spec: dict[str, Any], data: Path) -> Iterator[Document]:
    """A document for each Japanese page of HTML help; one without text is dropped as "empty"."""
    for path, raw in _package_members(data / name, re.compile(r"/help/ja/text/.*\.html$")):
        text = html_text(_utf8(raw, data / name, path))
        yield Document(path.split("/help/ja/text/")[1].removesuffix(".html"), text, "" if text else "empty")


def description_documents(name: str, spec: dict[str, Any], data: Path) -> Iterator[Document]:
    """A document for each package: its name, the one-line summary and the description."""
    for package, summary, body in read_descriptions(data / name):
        yield Document(package, f"{package} - {summary}\n{body}".strip())


def tatoeba_documents(name: str, spec: dict[str, Any], data: Path) -> Iterator[Document]:
    """A document for each group of ``lines_per_document`` (20) sentences, in the order of the file.

    A single sentence is too short to learn from.
    """
    sentences = read_tatoeba(data / name)
    while group := list(itertools.islice(sentences, spec.get("lines_per_document", 20))):
        yield Document(group[0][0], "\n".join(japanese for _, japanese, _ in group))


def _package_members(folder: Path, pattern: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """The regular files whose path matches, of all .deb packages in a folder, streamed.

    Nothing is unpacked to disk.
    """
    for package in sorted(folder.glob("*.deb")):
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE
        ) as process:
            yield from tar_members(process.stdout, package, pattern, links=True)
        if process.returncode:
            raise RecipeError(f"{package}: dpkg-deb cannot read it. {REMEDY}")


def _utf8(raw: bytes, folder: Path, path: str) -> str:
    """The text of a file of a package. Raises RecipeError if it is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{folder}: {path}: not UTF-8 ({error.reason} at byte {error.start}). Remove its package from "
            "`packages` of the source in dataset.json"
        ) from error


def read_manpages(folder: Path) -> Iterator[ManPage]:
    """Every manual page of the packages in a folder, rendered to HTML by mandoc.

    Symbolic links are left out: they are second names of a page. A page that only names another one (``.so``)
    has an empty ``html``.
    """
    tool = _extract_mandoc(folder)

    def render(member: tuple[str, bytes]) -> ManPage:
        path, packed = member
        name, section = Path(path).name.removesuffix(".gz").rsplit(".", 1)
        raw = gunzip(packed, folder, path)
        source = _utf8(raw, folder, path)
        if re.match(r"(\.\\\".*\n|\s)*\.so\s", source):
            return ManPage(name, section, source, "")
        command = [tool, "-K", "utf-8", "-T", "html", "-O", "fragment"]
        html = subprocess.run(command, input=raw, capture_output=True).stdout.decode("utf-8")
        if not html:
            raise RecipeError(f"{path}: mandoc rendered nothing. Run `{tool} -T html` on it to see why")
        return ManPage(name, section, source, html)

    pages = _package_members(folder, re.compile(r"/man/ja/man\d\w*/.*\.gz$"))
    with ThreadPoolExecutor(host.cores()) as pool:
        while batch := list(itertools.islice(pages, 64)):
            yield from pool.map(render, batch)


def _extract_mandoc(folder: Path) -> str:
    """The path of the mandoc program, which is taken out of its package in `folder` on first use."""
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
    ["p", "div", "section", "article", "h1", "h2", "h3", "h4", "h5", "h6", "li", "dt", "dd", "tr", "pre"]
    + ["table", "ul", "ol", "dl", "br", "body"]
)
_HIDDEN_TAGS = frozenset(("script", "style", "head", "header", "footer", "nav", "aside", "noscript"))
# mandoc's page header and footer; the "see also" boxes of the help.
_HIDDEN_CLASSES = frozenset(("head", "foot", "relatedtopics"))


def html_text(html: str) -> str:
    """The text of an HTML page: a line for each block element; white space is kept inside ``<pre>`` only."""
    from lxml import etree
    from lxml import html as lxml_html

    parts: list[str] = []

    def walk(element: Any, preformatted: bool) -> None:
        tag = element.tag
        if isinstance(tag, str) and tag not in _HIDDEN_TAGS and element.get("class") not in _HIDDEN_CLASSES:
            block = tag in _BLOCK_TAGS
            preformatted = preformatted or tag == "pre"
            if block:
                parts.append("\n")
            if element.text:
                parts.append(element.text if preformatted else re.sub(r"\s+", " ", element.text))
            for child in element:
                walk(child, preformatted)
                if child.tail:
                    parts.append(child.tail if preformatted else re.sub(r"\s+", " ", child.tail))
            if block:
                parts.append("\n")

    try:
        walk(lxml_html.document_fromstring(html), False)
    except etree.ParserError:  # only white space
        return ""
    lines = (line.rstrip() if line.startswith("  ") else line.strip() for line in "".join(parts).split("\n"))
    return "\n".join(line for line in lines if line)


def read_descriptions(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(package, one-line summary, body) of every translated package description.

    The body has one line for each paragraph.
    """
    for path in sorted(folder.glob("*Translation-ja")):
        for stanza in path.read_text("utf-8").split("\n\n"):
            match = re.match(r"Package: (\S+)\n(?:.*\n)*?Description-ja: (.*)\n?((?: .*\n?)*)", stanza)
            if match:
                package, summary, body = match.groups()
                yield package, summary.strip(), _unwrap([line[1:] for line in body.splitlines()])


def _unwrap(lines: list[str]) -> str:
    """Undo the wrapping of lines at a column.

    A line " ." separates paragraphs. A line that is indented further or begins a list item stays a line.
    """
    paragraphs: list[str] = [""]
    for line in lines:
        if line == ".":
            paragraphs.append("")
        elif line.startswith((" ", "*", "-")):
            paragraphs.append(line.strip())
        else:
            last = paragraphs[-1]
            # No space where a Japanese line was wrapped; one space between Latin words.
            glue = " " if last and last[-1].isascii() and line[:1].isascii() else ""
            paragraphs[-1] = last + glue + line.strip()
    return "\n".join(p for p in paragraphs if p)


def read_tatoeba(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(id, Japanese, English) of every sentence; the English is empty if there is no translation."""
    (archive_path,) = folder.glob("*.tar.gz")
    with gzip.open(archive_path) as handle:
        pattern = re.compile("/res/sentences/SENTENCES$")
        for _, content in tar_members(handle, archive_path, pattern):
            for number, line in enumerate(io.BytesIO(content), 1):
                fields = line.decode("utf-8").rstrip("\n").split("\t")
                if len(fields) < 3:
                    raise RecipeError(
                        f"{archive_path}: SENTENCES line {number}: {len(fields)} columns, expected 3"
                    )
                yield fields[0], fields[1], "" if fields[2] == "-" else fields[2]
            return
    raise RecipeError(f"{archive_path}: no file res/sentences/SENTENCES in it. {REMEDY}")
