"""One HTML page about a recipe's run: the results first, then the details of every stage, folded.

Run:  python -m recipe.export.html_report --recipe tiny
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Any

from markdown_it import MarkdownIt

from recipe import project
from recipe.config.recipe import load_recipe, recipe_options
from recipe.conversations.preferences import skipped_stages
from recipe.endings import errors_in_one_line
from recipe.export.summary import headlines, outdated
from recipe.project import RECORD, Refused, known_record, write_text

# The results: a heading, and the files of the stages that are shown under it, each under its own title.
RESULTS = {
    "Learning curve": {
        "05_pretrain/learning_curve.png": "Pretraining",
        "12_finetune/learning_curve.png": "Tuning on instructions",
        "13_preference/learning_curve.png": "Tuning on preferences",
    },
    "Samples": {
        "07_generate/samples.md": "Continued prompts, before and after pretraining",
        "15_generate/answers.md": "Answers, before and after tuning",
    },
    "Scores": {
        "06_evaluate/metrics.md": "After pretraining",
        "14_evaluate/metrics.md": "Before and after tuning",
    },
}
_RIGHT = ' class="number"'  # of a cell that is aligned to the right
MOST_FIGURES = 60  # rows in the table of a stage that wrote no text of its own


def write_report(recipe: str, config: dict[str, Any]) -> Path:
    """Write ``outputs/<recipe>/report.html`` from the finished stages, and return its path.

    The page is one file. It needs no network and runs no script. A stage or a file that is missing is left
    out, and what is left of a stage that the recipe no longer has. config: the whole recipe. Raises Refused
    when no stage is finished.
    """
    folder, skipped = project.OUTPUTS / recipe, skipped_stages(config)
    known = (
        known_record(path.parent, "stage", "finished")
        for path in sorted(folder.glob(f"[0-9]*/{RECORD}"))
        if path.parent.name not in skipped
    )
    records = [record for record in known if record]
    if not records:
        raise Refused(f"recipe {recipe!r} has no finished stage. Run `bash run_all.sh --recipe {recipe}`")
    last = max(records, key=lambda record: record["finished"])
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    finished = last["finished"].replace("T", " ")
    template = Template(Path(__file__).with_name("html_report.html").read_text("utf-8"))
    page = template.substitute(
        title=html.escape(f"Recipe {recipe}"),
        made=html.escape(f"Finished {finished}, commit {last['commit'] or 'unknown'}"),
        headlines="\n".join(
            f"<div><small>{html.escape(label)}</small><b>{html.escape(value)}</b>"
            f"<small>{html.escape(note)}</small></div>"
            for label, value, note in headline_figures(records)
        ),
        results="\n".join(_results(folder, skipped)),
        overview=_overview(records),
        details="\n".join(_stage(folder, record) for record in records),
        versions=html.escape(versions),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def headline_figures(records: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """The figures that a reader looks for first, as (label, value, note); only those that are known.

    records: the ``stage.json`` of the finished stages. Those of another model than the newest do not count.
    """
    old = outdated(records)
    figures = {record["stage"]: record["figures"] for record in records if record["stage"] not in old}
    trained, measured = figures.get("05_pretrain", {}), figures.get("06_evaluate", {})
    tuned = figures.get("14_evaluate", {})
    if "parameters" in (trained.get("active") or {}):
        active = trained["active"].get("active_parameters")
        note = f"{_short(active)} active" if active else trained.get("hardware", "")
        yield "parameters", _short(trained["active"]["parameters"]), note
    if trained.get("tokens"):
        yield "training tokens", _short(trained["tokens"]), f"{trained['steps']:,} steps"
    if trained.get("eval_loss") is not None:
        perplexity = math.exp(min(trained["eval_loss"], 100))
        yield "valid loss", f"{trained['eval_loss']:.4f}", f"perplexity {perplexity:,.1f}"
    if "in_domain" in measured:
        outside = measured.get("out_of_domain")
        note = f"out of domain {outside['bits_per_byte']:.4f}" if outside else "in domain"
        yield "bits per byte", f"{measured['in_domain']['bits_per_byte']:.4f}", note
    if tuned:
        before, after = tuned["before"], tuned["after"]
        yield "response loss", f"{after['response_loss']:.4f}", f"{before['response_loss']:.4f} before tuning"
    speed = f"{trained['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in trained else ""
    yield "time, all stages", _duration(sum(record["seconds"] for record in records)), speed


def _short(count: int) -> str:
    """A count with three digits and a unit: ``5.24 M``."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:,.{max(0, 2 - int(math.log10(count / size)))}f} {unit}"
    return str(count)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _results(folder: Path, skipped: tuple[str, ...]) -> Iterator[str]:
    """The sections of RESULTS; a section without any file is left out."""
    for heading, files in RESULTS.items():
        shown = {
            folder / name: title
            for name, title in files.items()
            if (folder / name).exists() and not name.startswith(skipped)
        }
        if shown:
            yield f"<h2>{heading}</h2>"
        for path, title in shown.items():
            content = _picture(path) if path.suffix == ".png" else _render(path.read_text("utf-8"))
            yield f'<div class="{heading.lower()}"><h3>{title}</h3>{content}</div>'


def _overview(records: list[dict[str, Any]]) -> str:
    rows = [
        (r["stage"], f"{r['seconds']:,.1f}", f"{r['peak_memory_bytes'] / 2**20:,.0f}", headline)
        for r, headline in zip(records, headlines(records), strict=True)
    ]
    rows.append(("total", f"{sum(r['seconds'] for r in records):,.1f}", "", ""))
    return _table(("stage", "seconds", "peak memory, MiB", "result"), rows)


def _stage(folder: Path, record: dict[str, Any]) -> str:
    """The details of a stage, folded: pictures, texts, settings; its figures where it wrote no text.

    What the results already show is left out, and the model card of stage 16, which repeats the other stages.
    """
    name = record["stage"]
    shown = {file for files in RESULTS.values() for file in files}
    is_card = (folder / name / "README.md").exists()
    files = [] if is_card else sorted((folder / name).iterdir())
    texts = [path for path in files if path.suffix == ".md"]
    parts = [_picture(path) for path in files if path.suffix == ".png" and f"{name}/{path.name}" not in shown]
    parts += [_render(path.read_text("utf-8")) for path in texts if f"{name}/{path.name}" not in shown]
    if not texts and record["figures"]:
        rows = list(flat_figures(record["figures"]))
        parts.append(_table(("figure", "value"), rows[:MOST_FIGURES]))
        if len(rows) > MOST_FIGURES:
            parts.append(f"<p>and {len(rows) - MOST_FIGURES} more in {name}/stage.json</p>")
    config = html.escape(json.dumps(record["config"], ensure_ascii=False, indent=2))
    parts.append(f'<details><summary>settings</summary><pre lang="ja">{config}</pre></details>')
    title = f"<b>{html.escape(name)}</b> {html.escape(record['headline'])}"
    return f"<details><summary>{title}</summary>{''.join(parts)}</details>"


def _render(markdown: str) -> str:
    """Markdown as HTML, every table in a box that scrolls.

    HTML in the text is shown as text, except line breaks in cells. Links and pictures stay text, so that what
    a model wrote leads nowhere.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.disable(["link", "image", "autolink", "reference"])
    page = parser.render(markdown).replace("&lt;br&gt;", "<br>").replace(' style="text-align:right"', _RIGHT)
    page = page.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    return f'<div lang="ja">{page}</div>'


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}"></p>'


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _cell(text: str) -> str:
    """A cell of a table; numbers are aligned to the right."""
    kind = _RIGHT if re.fullmatch(r"[-+\d,.e]+", text) else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def flat_figures(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every figure of a nested JSON value, as (path, readable value): ``("active.device", "cpu")``."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flat_figures(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, float):
        yield path, f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    else:
        yield path, f"{value:,}" if type(value) is int else str(value)


def main() -> None:
    """Write the page of a recipe, and print its path."""
    arguments = recipe_options(__doc__).parse_args()
    with errors_in_one_line("report"):
        config = load_recipe(arguments.recipe, arguments.overrides)
        print(f"report: {write_report(arguments.recipe, config).relative_to(project.ROOT)}")


if __name__ == "__main__":
    main()
