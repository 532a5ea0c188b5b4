"""The page about a run: results first, details folded, one file that needs no network."""

import base64

import pytest
from lxml import html
from recipe import project
from recipe.export import html_report
from recipe.project import Refused, write_json

PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
TABLE = b"| prompt | before | after |\n|---|---|---:|\n| \xe5\xb1\xb1\xe3\x81\xaf | x | 12 |\n"


WHOLE = {"instruction": {"pairs": {"a": {}}}, "preference": {}}


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
            (folder / ".".join(file.rsplit("_", 1))).write_bytes(content)

    return add


def page_of(recipe="r", config=WHOLE):
    text = html_report.write_report(recipe, config).read_text("utf-8")
    return html.document_fromstring(text), text


def test_results_come_first_and_the_details_of_the_stages_are_folded(run):
    run("02_dataset", funnel_md=b"| source | kept |\n|---|---:|\n| wiki | 12 |\n", funnel_png=PICTURE)
    run("05_pretrain", learning_curve_png=PICTURE, samples_md=b"while training")
    run("06_evaluate", metrics_md=b"| task | score |\n|---|---:|\n| jnli | 40 |\n")
    run("07_generate", samples_md=TABLE)
    page, _ = page_of()
    assert [heading.text for heading in page.iter("h2")] == ["Learning curve", "Samples", "Scores", "Stages"]
    (curve,) = page.xpath("//div[h3]//img")
    assert base64.b64decode(curve.get("src").partition(",")[2]) == PICTURE
    folded = page.xpath("//body/details")
    assert [details.find("summary/b").text for details in folded] == [
        "02_dataset", "05_pretrain", "06_evaluate", "07_generate",
    ]  # fmt: skip
    assert not page.xpath("//details[@open]")
    assert [len(details.xpath(".//img")) for details in folded] == [1, 0, 0, 0]  # the curve is not repeated
    assert "wiki" in folded[0].text_content() and "while training" in folded[1].text_content()
    text = page.text_content()
    assert text.count("jnli") == 1 and text.index("jnli") < text.index("wiki")
    assert "山は" in page.xpath("//h2[.='Samples']/following::td")[0].text


def test_every_table_scrolls_in_a_box_of_its_own(run):
    run("02_dataset", funnel_md=TABLE + b"\ntext\n\n" + TABLE)
    run("04_tokenize", {"tokens": 1})
    page, _ = page_of()
    tables = list(page.iter("table"))
    assert len(tables) == 4  # the stages, two of stage 02, the figures of stage 04
    for table in tables:
        assert table.getparent().get("class") == "wide" and len(table.getparent()) == 1


def test_headline_figures(run):
    figures = {"active": {"parameters": 5_243_136}, "hardware": "a CPU", "steps": 760, "tokens": 3_112_960}
    run("05_pretrain", figures | {"eval_loss": 4.0, "tokens_per_second": 10_392.4})
    inside, outside = {"bits_per_byte": 1.2553}, {"bits_per_byte": 1.8243}
    run("06_evaluate", {"in_domain": inside, "out_of_domain": outside})
    run("14_evaluate", {"before": {"response_loss": 4.992}, "after": {"response_loss": 3.9}})
    page, _ = page_of()
    shown = [[part.text for part in box] for box in page.xpath("//div[@class='headlines']/div")]
    assert shown == [
        ["parameters", "5.24 M", "a CPU"],
        ["training tokens", "3.11 M", "760 steps"],
        ["valid loss", "4.0000", "perplexity 54.6"],
        ["bits per byte", "1.2553", "out of domain 1.8243"],
        ["response loss", "3.9000", "4.9920 before tuning"],
        ["time, all stages", "0 min 4 s", "10,392 tokens/s"],
    ]


def test_a_run_that_has_only_begun_shows_what_there_is(run):
    """Also a stage 05 whose figures lack what could not be measured."""
    run("05_pretrain", {"active": {"device": "cpu"}, "tokens": 0, "steps": 0, "eval_loss": None})
    page, _ = page_of()
    assert [heading.text for heading in page.iter("h2")] == ["Stages"]
    assert [box[0].text for box in page.xpath("//div[@class='headlines']/div")] == ["time, all stages"]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(1.5, "0 min 2 s"), (599.6, "10 min 0 s"), (7_380, "2 h 3 min")]
)
def test_durations(seconds, shown):
    records = [{"stage": "01_download", "figures": {}, "seconds": seconds}]
    assert list(html_report.headline_figures(records)) == [("time, all stages", shown, "")]


@pytest.mark.parametrize(
    ("count", "shown"), [(7, "7"), (31_129, "31.1 k"), (999_900, "1,000 k"), (2_500_000_000, "2.50 B")]
)
def test_counts(count, shown):
    figures = {"tokens": count, "steps": 1}
    records = [{"stage": "05_pretrain", "figures": figures, "seconds": 1}]
    assert next(html_report.headline_figures(records))[1] == shown


def test_times_memory_and_figures_of_the_stages_are_there(run):
    run("02_dataset")
    run("05_pretrain", {"eval_loss": 3.25, "active": {"device": "cpu"}})
    run("16_export", README_md=b"# card", curve_png=PICTURE)
    page, _ = page_of()
    assert not list(page.iter("img"))  # the card repeats the others
    cells = [cell.text_content() for cell in page.iter("td")]
    assert "05_pretrain <done>" in cells and "1,024" in cells and "4.5" in cells  # memory; seconds in all
    assert cells[cells.index("eval_loss") + 1] == "3.25" and cells[cells.index("active.device") + 1] == "cpu"
    assert '"山は"' in page.text_content()


def test_nothing_is_loaded_from_the_network_or_run(run):
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
        html_report.write_report("none", WHOLE)


def test_what_is_left_of_a_stage_that_the_recipe_no_longer_has_is_not_shown(run):
    picture = {"learning_curve_png": b"png"}
    for stage in ("05_pretrain", "12_finetune", "13_preference"):
        run(stage, **picture)
    for config, shown in (
        (WHOLE, ["Pretraining", "Tuning on instructions", "Tuning on preferences"]),
        ({"instruction": {"pairs": {"a": {}}}}, ["Pretraining", "Tuning on instructions"]),
        ({"instruction": {"pairs": {}}}, ["Pretraining"]),
    ):
        page, text = page_of(config=config)
        assert page.xpath("//h3/text()")[: len(shown) + 1] == shown
        assert ("13_preference" in text) == (config is WHOLE)


def test_long_figures_are_cut_and_counted(run):
    run("04_tokenize", {f"key{i}": i for i in range(html_report.MOST_FIGURES + 7)})
    assert "and 7 more" in page_of()[1]
