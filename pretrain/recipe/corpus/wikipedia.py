"""The pages of a database dump of Wikipedia, as wikitext. `recipe.corpus.wikitext` extracts their prose."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple
from xml.etree import ElementTree

from recipe.corpus.archives import REMEDY
from recipe.corpus.readers import Document
from recipe.project import RecipeError


class Page(NamedTuple):
    """A page of the dump: `redirect` is the title it points to, or ""; `model` is the content model."""

    title: str
    namespace: int
    id: int
    redirect: str
    text: str
    model: str

    @property
    def dropped(self) -> str:
        """Why the page is not an article, or "" if its text must be checked."""
        if self.namespace != 0 or self.model != "wikitext":
            return "not an article"
        return "redirect" if self.redirect else ""


def read_pages(handle: IO[bytes], name: str = "the dump") -> Iterator[Page]:
    """Every page of a MediaWiki XML export of any schema version, in order, in constant memory.

    handle: the decompressed stream. If a page has several revisions, the last one in the file is used.
    Raises RecipeError with `name` and the last page that was read, if the stream ends too early, is damaged,
    or is not well-formed XML or not an export.
    """
    last = "the first page"
    events = ElementTree.iterparse(handle, events=("start", "end"))
    try:
        _, root = next(events)
        if _tag(root) != "mediawiki":
            raise RecipeError(f"{name}: not a MediaWiki export: root <{_tag(root)}>, expected <mediawiki>")
        for event, element in events:
            if event == "end" and _tag(element) == "page":
                page = _page(element)
                root.clear()
                yield page
                last = f"the page after {page.title!r} (id {page.id})"
    except (ElementTree.ParseError, EOFError, OSError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise RecipeError(f"{name}: broken at {last} ({error}). {REMEDY}") from error


def read_dump(path: Path) -> Iterator[Document]:
    """The pages of a dump as wikitext, named by their titles. What is not an article carries the reason.

    Raises RecipeError for a dump that ends too early, also with a ``maximum_bad_share``: pages that are
    missing cannot be counted.
    """
    openers = {".bz2": bz2.open, ".gz": gzip.open, ".xz": lzma.open, ".xml": open}
    if path.suffix not in openers:
        raise RecipeError(
            f"{path}: unknown kind of dump {path.suffix!r}, expected one of {', '.join(openers)}"
        )
    with openers[path.suffix](path, "rb") as handle:
        for page in read_pages(handle, str(path)):
            yield Document(page.title, page.text, page.dropped)


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _page(element: ElementTree.Element) -> Page:
    """A `Page` from its element. Raises ValueError with the name of a missing element."""
    fields = {_tag(child): child for child in element}
    revision = {_tag(child): child.text or "" for child in fields.get("revision", ())}
    values = {key: fields[key].text or "" for key in ("title", "ns", "id") if key in fields}
    if missing := {"title", "id"} - values.keys():
        raise ValueError(f"a page without <{min(missing)}>")
    redirect = fields["redirect"].get("title", "") if "redirect" in fields else ""
    return Page(
        title=values["title"],
        namespace=int(values.get("ns", 0)),  # schemas before 0.6 have no <ns>
        id=int(values["id"]),
        redirect=redirect,
        text=revision.get("text", ""),
        model=revision.get("model", "wikitext"),
    )
