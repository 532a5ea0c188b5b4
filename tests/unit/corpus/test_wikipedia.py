"""Dumps of Wikipedia: pages of every schema version, and broken dumps."""

import bz2
import gc
import io
import random
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import pytest
from recipe.corpus import wikipedia
from recipe.corpus.wikipedia import read_pages
from recipe.corpus.wikitext import extract
from recipe.project import RecipeError


def page_xml(number, text="文", namespace="<ns>0</ns>", redirect="", model="<model>wikitext</model>"):
    return (
        f"  <page>\n    <title>題{number}</title>\n    {namespace}\n    <id>{number}</id>\n    {redirect}\n"
        f"    <revision>\n      <id>{number + 1000}</id>\n"
        f"      <contributor><id>7</id></contributor>\n      {model}\n"
        f'      <text bytes="9" xml:space="preserve">{escape(text)}</text>\n    </revision>\n  </page>\n'
    )


def dump(pages, version="0.11"):
    """A pages-articles export as MediaWiki writes it."""
    schema = f"http://www.mediawiki.org/xml/export-{version}/"
    head = f'<mediawiki xmlns="{schema}" version="{version}"><siteinfo><sitename>W</sitename></siteinfo>\n'
    return [part.encode() for part in (head, *pages, "</mediawiki>\n")]


MIXED = [
    page_xml(1, "'''一''' & <ref>x</ref>"),
    page_xml(2, "#転送 [[題1]]", redirect='<redirect title="題1" />'),
    page_xml(3, "議論", namespace="<ns>1</ns>"),
    page_xml(4, "{}", model="<model>json</model>"),
    page_xml(5, ""),
]


@pytest.mark.parametrize("version", ["0.3", "0.10", "0.11", "0.12"])
def test_pages_of_any_schema_version(version):
    pages = list(read_pages(io.BytesIO(b"".join(dump(MIXED, version)))))
    assert pages[0] == wikipedia.Page("題1", 0, 1, "", "'''一''' & <ref>x</ref>", "wikitext")
    assert [page.dropped for page in pages] == ["", "redirect", "not an article", "not an article", ""]
    assert pages[1].redirect == "題1"
    assert extract(pages[4].title, pages[4].text)[1] == "empty"


def test_old_schema_without_namespace_and_model():
    (page,) = read_pages(io.BytesIO(b"".join(dump([page_xml(1, namespace="", model="")], "0.3"))))
    assert (page.namespace, page.model, page.dropped) == (0, "wikitext", "")


def test_bz2_of_one_stream_and_of_many(tmp_path):
    parts = dump([page_xml(number, f"文{number}") for number in range(300)])
    (tmp_path / "one.xml.bz2").write_bytes(bz2.compress(b"".join(parts)))
    (tmp_path / "many.xml.bz2").write_bytes(b"".join(map(bz2.compress, parts)))
    read = {}
    for name in ("one", "many"):
        with bz2.open(tmp_path / f"{name}.xml.bz2") as handle:
            read[name] = list(read_pages(handle))
    assert [page.text for page in read["one"]] == [f"文{number}" for number in range(300)]
    assert read["many"] == read["one"]


def test_truncated_bz2_is_named_with_the_last_page(tmp_path):
    path = tmp_path / "ja.xml.bz2"
    draw = random.Random(0)
    pages = [
        page_xml(number, "".join(map(chr, draw.choices(range(0x4E00, 0x9FFF), k=2000))))
        for number in range(400)
    ]
    packed = bz2.compress(b"".join(dump(pages)))
    path.write_bytes(packed[: len(packed) * 3 // 4])
    titles = []
    with bz2.open(path) as handle, pytest.raises(RecipeError) as error:
        for page in read_pages(handle, str(path)):
            titles.append(page.title)
    assert 100 < len(titles) < 400
    assert str(path) in str(error.value)
    assert f"the page after '{titles[-1]}' (id {len(titles) - 1})" in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"".join(dump(MIXED)[:-1]), r"ja\.xml: broken at the page after '題5' \(id 5\) \(no element found"),
        (b"".join([*dump(MIXED)[:3], b"<page><title>x</page>"]), r"after '題2' \(id 2\) \(mismatched tag"),
        (b"".join([*dump(MIXED)[:2], b"<page><ns>0</ns><id>1</id></page>"]), r"after '題1'.*without <title>"),
        (b"".join(dump([page_xml(1, namespace="<ns>x</ns>")])), r"broken at the first page .*'x'"),
        (b"<html></html>", r"not a MediaWiki export: root <html>, expected <mediawiki>"),
        (b"", r"broken at the first page \(no element found"),
        ("<mediawiki>\n<page><title>題".encode("cp932"), r"broken at the first page \(not well-formed"),
    ],
)
def test_broken_dump_is_named(content, words):
    with pytest.raises(RecipeError, match=words):
        list(read_pages(io.BytesIO(content), "ja.xml"))


def test_memory_does_not_grow_with_the_dump():
    parts = dump([page_xml(number, "文" * 3000) for number in range(200)])

    def live():
        return sum(isinstance(thing, ElementTree.Element) for thing in gc.get_objects())

    gc.collect()
    before = live()
    pages = enumerate(read_pages(io.BytesIO(b"".join(parts))))
    counts = [live() - before for number, _ in pages if number % 10 == 9]  # each look takes a while
    assert len(counts) == 20
    # Some pages are parsed ahead, as many as one read of the file holds; 200 pages have 1,800 elements.
    assert max(counts) < 200
