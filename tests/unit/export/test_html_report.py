"""The page about a run: everything inside it, nothing asked of the network, whatever stages there are."""

import base64

import pytest
from lxml import html
from recipe import project
from recipe.export import html_report
from recipe.project import Refused, write_json

PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Adds a finished stage to the recipe `r`."""
    monkeypatch.setattr(project, "OUTPUTS", tmp_path)

    def add(name, figures=None, **files):
        folder = tmp_path / "r" / name
        folder.mkdir(parents=True)
        record = {
            "stage": name,
            "headline": f"{name} <done>",
            "seconds": 1.5,
            "peak_memory_bytes": 2**30,
            "figures": figures or {},
            "config": {"generation": {"prompts": ["山は"]}},
            "versions": {"python": "3.11"},
            "commit": "abc",
            "finished": "2026-01-01T00:00:00+0000",
        }
        write_json(folder / "stage.json", record)
        for file, content in files.items():
            (folder / file.replace("_", ".")).write_bytes(content)

    return add


def page_of(recipe="r"):
    text = html_report.write_report(recipe).read_text("utf-8")
    return html.document_fromstring(text), text


def test_stages_times_texts_and_pictures_are_there(run):
    run("02_dataset", funnel_md=b"| source | kept |\n|---|---:|\n| wiki | 12 |\n")
    run("05_pretrain", {"eval_loss": 3.25, "active": {"device": "cpu"}}, curve_png=PICTURE)
    run("16_export", README_md=b"# card", curve_png=PICTURE)
    page, _ = page_of()
    assert len(list(page.iter("img"))) == 1  # the card repeats it
    cells = [cell.text_content() for cell in page.iter("td")]
    assert "05_pretrain <done>" in cells and "1,024" in cells and "4.5" in cells  # memory; seconds in all
    assert "wiki" in cells and "12" in cells
    assert cells[cells.index("eval_loss") + 1] == "3.25" and cells[cells.index("active.device") + 1] == "cpu"
    assert base64.b64decode(next(page.iter("img")).get("src").partition(",")[2]) == PICTURE
    assert '"山は"' in page.text_content()


def test_nothing_is_asked_of_the_network_or_run(run):
    """Also when a model writes HTML or Markdown that would."""
    text = "![x](http://evil/x.png) <img src=http://evil/y.png> <script>alert(1)</script> [a](http://evil) <http://b>"
    run("07_generate", samples_md=text.encode(), a_png=PICTURE)
    run("15_generate", {"answer": text})
    page, _ = page_of()
    assert "alert(1)" in page.text_content()
    assert not list(page.iter("script", "link", "iframe", "a", "object"))
    assert {image.get("src")[:5] for image in page.iter("img")} == {"data:"}
    assert not page.xpath("//@href | //@*[starts-with(name(), 'on')]")


def test_a_recipe_without_stages_is_refused(run):
    with pytest.raises(Refused, match="has no finished stage"):
        html_report.write_report("none")


def test_long_figures_are_cut_and_counted(run):
    run("04_tokenize", {f"key{i}": i for i in range(html_report.MOST_FIGURES + 7)})
    assert "and 7 more" in page_of()[1]
