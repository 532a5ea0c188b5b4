"""One HTML page about a recipe's run: time and memory by stage, then what each stage says of itself.

Run:  python -m recipe.export.html_report tiny
"""

from __future__ import annotations

import base64
import html
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Any

from markdown_it import MarkdownIt

from recipe import project
from recipe.project import RecipeError, Refused, read_json

MOST_FIGURES = 60  # rows of figures that are shown for a stage without a text of its own


def write_report(recipe: str) -> Path:
    """Write ``outputs/<recipe>/report.html`` from the finished stages, and return its path.

    The page holds everything itself: it asks for nothing over the network and runs no script. What a stage
    has not done, or not written, is not there. Raises Refused when no stage is finished.
    """
    folder = project.OUTPUTS / recipe
    records = [read_json(path) for path in sorted(folder.glob("[0-9]*/stage.json"))]
    if not records:
        raise Refused(f"recipe {recipe!r} has no finished stage. Run `bash run_all.sh --recipe {recipe}`")
    last = max(records, key=lambda record: record["finished"])
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    finished = last["finished"].replace("T", " ")
    template = Template(Path(__file__).with_name("html_report.html").read_text("utf-8"))
    page = template.substitute(
        title=html.escape(f"Recipe {recipe}"),
        made=html.escape(f"Finished {finished}, commit {last['commit'] or 'unknown'}; {versions}."),
        stages="\n".join([_overview(records), *(_stage(folder, record) for record in records)]),
    )
    part = folder / ".report.html.part"
    part.write_text(page, "utf-8")
    part.rename(folder / "report.html")
    return folder / "report.html"


def _overview(records: list[dict[str, Any]]) -> str:
    rows = [
        (r["stage"], f"{r['seconds']:,.1f}", f"{r['peak_memory_bytes'] / 2**20:,.0f}", r["headline"])
        for r in records
    ]
    rows.append(("total", f"{sum(r['seconds'] for r in records):,.1f}", "", ""))
    return _table(("stage", "seconds", "peak memory, MiB", "result"), rows)


def _stage(folder: Path, record: dict[str, Any]) -> str:
    """A stage's section: its pictures and texts, and, folded, its figures where it has no text, and settings.

    A model's card is left out, with its pictures: it repeats the others.
    """
    name = record["stage"]
    is_card = (folder / name / "README.md").exists()
    found = [] if is_card else sorted((folder / name).iterdir())
    texts = [_markdown(path.read_text("utf-8")) for path in found if path.suffix == ".md"]
    if not texts:
        rows = list(flat_figures(record["figures"]))
        table = _table(("figure", "value"), rows[:MOST_FIGURES])
        if len(rows) > MOST_FIGURES:
            table += f"<p>and {len(rows) - MOST_FIGURES} more in {name}/stage.json</p>"
        texts = [_folded("figures", table)] if rows else []
    pictures = [_picture(path) for path in found if path.suffix == ".png"]
    config = json.dumps(record["config"], ensure_ascii=False, indent=2)
    settings = _folded("settings", f"<pre>{html.escape(config)}</pre>")
    heading = f"<h2>{html.escape(name)}</h2>\n<p>{html.escape(record['headline'])}</p>"
    return "\n".join([heading, *pictures, *texts, settings])


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def _markdown(text: str) -> str:
    """Markdown as HTML. HTML in it is shown as text, but for line ends in cells; links and pictures of what a
    model wrote lead nowhere.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.disable(["link", "image", "autolink", "reference"])
    return f'<div class="wide">{parser.render(text).replace("&lt;br&gt;", "<br>")}</div>'


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}"></p>'


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _cell(text: str) -> str:
    """A cell of a table; a number stands to the right."""
    kind = ' class="number"' if re.fullmatch(r"[-+\d,.e]+", text) else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def flat_figures(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every figure of a nested JSON value, as its path and the value for people."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flat_figures(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, float):
        yield path, f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    else:
        yield path, f"{value:,}" if type(value) is int else str(value)


def main() -> None:
    """Write the page of the recipe that the command line names, and say where it is."""
    try:
        print(f"report: {write_report(sys.argv[1]).relative_to(project.ROOT)}")
    except RecipeError as error:
        print(f"report: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
