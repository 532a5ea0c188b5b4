"""Learning curves as pictures, of one run and of several.

    python -m recipe.training.curves RUN RUN ... [--output PICTURE]

lays runs over each other at equal tokens and at equal time and prints both as a table. RUN: a recipe's name
(its stage 05), a folder with metrics.jsonl, or such a file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from recipe.project import OUTPUTS, RecipeError, Refused

# What runs are compared by, the first that all of them have: bits per byte also compare over tokenizers.
MEASURES = {"eval_bits_per_byte": "valid bits/byte", "eval_loss": "valid loss", "loss": "training loss"}
AXES = {"tokens": ("million tokens", 1e6), "seconds": ("minutes", 60)}


def learning_curve(metrics: Path, picture: Path, title: str) -> None:
    """Draw loss and perplexity, training and validation, over tokens, from a metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    rows = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, name, value in ((axes[0], "loss (nats per token)", float), (axes[1], "perplexity", math.exp)):
        for key, label, style in (("loss", "train", "-"), ("eval_loss", "valid", "o--")):
            points = [(row["tokens"] / 1e6, value(row[key])) for row in rows if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        axis.set_xlabel("million tokens")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
        axis.legend()
    axes[1].set_yscale("log", subs=())
    axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1].yaxis.set_major_formatter("{x:,.0f}")
    figure.suptitle(title)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def read_run(name: str) -> list[dict[str, Any]]:
    """The rows of a run by a recipe's name, a folder, or a metrics.jsonl.

    Raises Refused where there is none.
    """
    places = [Path(name), Path(name) / "metrics.jsonl"]
    places += [OUTPUTS / name / folder / "metrics.jsonl" for folder in ("05_pretrain", ".05_pretrain.work")]
    for place in places:
        if place.is_file():
            lines = place.read_text("utf-8").splitlines()
            return [json.loads(line) for line in lines if line.endswith("}")]  # the last may be half written
    raise Refused(
        f"{name}: no run: wanted a recipe that stage 05 has trained, or a folder with metrics.jsonl. "
        f"Looked for {', '.join(map(str, places))}"
    )


def short_names(names: list[str]) -> list[str]:
    """What tells runs apart: their paths without the parts that all have in front or at the end."""
    parts = [Path(name).parts for name in names]
    for end in (0, -1):
        while all(len(p) > 1 for p in parts) and len({p[end] for p in parts}) == 1 and len(parts) > 1:
            parts = [p[1:] if end == 0 else p[:-1] for p in parts]
    return [str(Path(*p)) for p in parts]


def common_measure(runs: dict[str, list[dict[str, Any]]]) -> str:
    """The first of `MEASURES` that every run has. Raises Refused when there is none."""
    for measure in MEASURES:
        if all(any(measure in row for row in rows) for rows in runs.values()):
            return measure
    raise Refused(f"{', '.join(runs)}: no figure that all of them have; wanted one of {', '.join(MEASURES)}")


def value_at(rows: list[dict[str, Any]], measure: str, axis: str, place: float) -> float | None:
    """A run's figure at so many tokens or seconds, by a straight line between its rows; None outside them."""
    points = [(row[axis], row[measure]) for row in rows if measure in row]
    for (left, low), (right, high) in zip(points, points[1:] or points, strict=False):
        if left <= place <= right:
            return low if left == right else low + (high - low) * (place - left) / (right - left)
    return None


def comparison(runs: dict[str, list[dict[str, Any]]]) -> str:
    """A Markdown table: what each run reached, and where all stood when the shortest ended, by tokens and by
    time.
    """
    measure = common_measure(runs)
    ends = {axis: min(_end(rows, measure, axis) for rows in runs.values()) for axis in AXES}
    heads = ["run", f"{MEASURES[measure]} at the end", "million tokens", "minutes"]
    heads += [f"at {ends[axis] / scale:,.3g} {name}" for axis, (name, scale) in AXES.items()]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for name, rows in runs.items():
        last = [row[measure] for row in rows if measure in row][-1]
        cells = [f"{last:.4f}"]
        cells += [f"{_end(rows, measure, axis) / scale:,.3g}" for axis, (_, scale) in AXES.items()]
        for axis, end in ends.items():
            value = value_at(rows, measure, axis, end)
            cells.append("not measured yet" if value is None else f"{value:.4f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _end(rows: list[dict[str, Any]], measure: str, axis: str) -> float:
    return [row[axis] for row in rows if measure in row][-1]


def overlay(runs: dict[str, list[dict[str, Any]]], picture: Path) -> None:
    """Draw several runs into one picture: left at equal tokens, right at equal time.

    A dotted line marks where the shortest ended: there the table compares them.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measure = common_measure(runs)
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for panel, (axis, (label, scale)) in zip(panels, AXES.items(), strict=True):
        for name, rows in runs.items():
            points = [(row[axis] / scale, row[measure]) for row in rows if measure in row]
            (line,) = panel.plot(*zip(*points, strict=True), "o-", label=name, markersize=3)
            end, figure_there = points[-1], f"{points[-1][1]:.3f}"
            where = {"textcoords": "offset points", "ha": "right", "va": "top", "color": line.get_color()}
            panel.annotate(figure_there, end, (-4, -5), **where)
        shortest = min(_end(rows, measure, axis) for rows in runs.values()) / scale
        panel.axvline(shortest, color="grey", linestyle=":", linewidth=1)
        panel.margins(y=0.1)
        panel.set_xlim(left=0)
        panel.set_xlabel(label)
        panel.set_ylabel(MEASURES[measure])
        panel.yaxis.set_tick_params(labelleft=True)
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Lay the learning curves of several runs over each other, at equal tokens and at equal time."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a recipe, a folder or a metrics.jsonl")
    parser.add_argument("--output", type=Path, default=Path("comparison.png"), metavar="PICTURE")
    arguments = parser.parse_args()
    try:
        names = short_names(arguments.runs)
        runs = {name: read_run(run) for name, run in zip(names, arguments.runs, strict=True)}
        print(comparison(runs), end="")
        overlay(runs, arguments.output)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
