"""Learning curves as pictures and tables, of one run and of several.

    python -m recipe.training.curves RUN RUN ... [--output PICTURE]

draws several runs into one picture, at equal tokens and at equal time, and prints both as a table. RUN: a
recipe's name (its stage 05), a folder with metrics.jsonl, or such a file.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recipe.endings import errors_in_one_line
from recipe.project import (
    Refused,
    markdown_table,
    read_json_lines,
    stage_folder,
    work_folder,
    write_text,
)
from recipe.training.files import METRICS

# Runs are compared by the first of these that all of them have. Bits per byte compare also different
# tokenizers.
MEASURES = {"eval_bits_per_byte": "valid bits/byte", "eval_loss": "valid loss", "loss": "training loss"}
AXES = {"tokens": ("million tokens", 1e6), "seconds": ("minutes", 60)}


def write_curves(folder: Path, title: str, with_perplexity: bool = True, changes: Sequence[int] = ()) -> None:
    """Write ``learning_curve.png`` and ``metrics.md`` from the metrics.jsonl of a training in `folder`.

    with_perplexity: False for a loss that is not a cross entropy of tokens (preferences). changes: the tokens
    at which a new phase begins.
    """
    rows = read_json_lines(folder / METRICS)
    learning_curve(rows, folder / "learning_curve.png", title, with_perplexity, changes)
    write_text(folder / "metrics.md", f"# {title}\n\n{metrics_table(rows, with_perplexity)}")


def perplexity(loss: float) -> float:
    """exp(loss); infinite where a float cannot hold it."""
    return math.inf if loss >= 700 else math.exp(loss)


def metrics_table(rows: list[dict[str, Any]], with_perplexity: bool = True) -> str:
    """A Markdown table with a row for each evaluation; the last one is the end of the training.

    rows: of metrics.jsonl. The training loss is the last one that was logged up to the evaluation: the mean
    since the log before it.
    """
    heads = ["step", "train loss", "valid loss"]
    heads += ["train perplexity", "valid perplexity"] if with_perplexity else []
    table = []
    train: float | None = None
    evaluations: dict[int, list[float | None]] = {}
    for row in rows:
        train = row.get("loss", train)
        if "eval_loss" in row:
            evaluations[row["step"]] = [train, row["eval_loss"]]
    for step, losses in evaluations.items():
        cells = [f"{step:,}"] + ["" if loss is None else f"{loss:.4f}" for loss in losses]
        if with_perplexity:
            cells += ["" if loss is None else f"{perplexity(loss):,.2f}" for loss in losses]
        table.append(cells)
    return "\n".join(markdown_table(heads, table, "r")) + "\n"


def learning_curve(
    rows: list[dict[str, Any]],
    picture: Path,
    title: str,
    with_perplexity: bool = True,
    changes: Sequence[int] = (),
) -> None:
    """Draw loss and perplexity, both of training and validation, and the learning rate over tokens.

    rows: of metrics.jsonl. changes: tokens at which a dashed line marks the begin of a phase.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    def draw(axis: Any, key: str, value: Callable[[float], float], style: str, label: str | None) -> None:
        points = [(row["tokens"] / 1e6, value(row[key])) for row in rows if key in row]
        if points:
            axis.plot(*zip(*points, strict=True), style, label=label, markersize=4)

    count = 3 if with_perplexity else 2
    figure = Figure(figsize=(4.5 * count, 4), layout="constrained")
    axes = figure.subplots(1, count)
    loss = "loss (nats per token)" if with_perplexity else "loss"
    panels: list[tuple[Any, str, Callable[[float], float]]] = [(axes[0], loss, float)]
    if with_perplexity:
        panels.append((axes[1], "perplexity", perplexity))
        axes[1].set_yscale("log", subs=())
        axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[1].yaxis.set_major_formatter("{x:,.10g}")
    for axis, name, value in panels:
        draw(axis, "loss", value, "-", "train")
        draw(axis, "eval_loss", value, "o--", "valid")
        axis.set_ylabel(name)
    draw(axes[-1], "learning_rate", float, "C2-", None)
    axes[-1].set_ylabel("learning rate")
    axes[-1].set_ylim(bottom=0)
    axes[-1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axis in axes:
        for tokens in changes:
            label = "new phase" if tokens == changes[0] else None
            axis.axvline(tokens / 1e6, color="grey", linestyle="--", linewidth=1, label=label)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
        axis.set_xlabel("million tokens")
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(picture, dpi=110)


def read_run(name: str) -> list[dict[str, Any]]:
    """The rows of a run by a recipe's name, a folder, or a metrics.jsonl. Raises Refused without a file."""
    paths = [Path(name), Path(name) / METRICS]
    final = stage_folder(name, "05_pretrain")
    paths += [folder / METRICS for folder in (final, work_folder(final))]
    for path in paths:
        if path.is_file():
            return read_json_lines(path)
    raise Refused(
        f"{name}: no run found; expected a recipe that stage 05 has trained, or a folder with metrics.jsonl. "
        f"Looked for {', '.join(map(str, paths))}"
    )


def short_names(names: list[str]) -> list[str]:
    """Short names of runs: their paths without the parts that are the same in all of them."""
    parts = [Path(name).parts for name in names]
    for end in (0, -1):
        while all(len(p) > 1 for p in parts) and len({p[end] for p in parts}) == 1 and len(parts) > 1:
            parts = [p[1:] if end == 0 else p[:-1] for p in parts]
    return [str(Path(*p)) for p in parts]


def common_measure(runs: dict[str, list[dict[str, Any]]]) -> str:
    """The first of `MEASURES` that every run has. Raises Refused if they share none."""
    for measure in MEASURES:
        if all(any(measure in row for row in rows) for rows in runs.values()):
            return measure
    raise Refused(
        f"{', '.join(runs)}: no figure that all of them have; expected one of {', '.join(MEASURES)}"
    )


def value_at(rows: list[dict[str, Any]], measure: str, axis: str, point: float) -> float | None:
    """A run's figure at so many tokens or seconds, by a straight line between its rows; None outside them."""
    points = [(row[axis], row[measure]) for row in rows if measure in row]
    for (left, low), (right, high) in zip(points, points[1:] or points, strict=False):
        if left <= point <= right:
            return low if left == right else low + (high - low) * (point - left) / (right - left)
    return None


def comparison(runs: dict[str, list[dict[str, Any]]]) -> str:
    """A Markdown table: each run's figure at its end and at the end of the shortest run (tokens, time)."""
    measure = common_measure(runs)
    ends = {axis: min(_end(rows, measure, axis) for rows in runs.values()) for axis in AXES}
    heads = ["run", f"{MEASURES[measure]} at the end", "million tokens", "minutes"]
    heads += [f"at {ends[axis] / scale:,.3g} {name}" for axis, (name, scale) in AXES.items()]
    table = []
    for name, rows in runs.items():
        last = [row[measure] for row in rows if measure in row][-1]
        cells = [name, f"{last:.4f}"]
        cells += [f"{_end(rows, measure, axis) / scale:,.3g}" for axis, (_, scale) in AXES.items()]
        for axis, end in ends.items():
            value = value_at(rows, measure, axis, end)
            cells.append("not measured yet" if value is None else f"{value:.4f}")
        table.append(cells)
    return "\n".join(markdown_table(heads, table)) + "\n"


def _end(rows: list[dict[str, Any]], measure: str, axis: str) -> float:
    return [row[axis] for row in rows if measure in row][-1]


def overlay(runs: dict[str, list[dict[str, Any]]], picture: Path) -> None:
    """Draw several runs into one picture: left at equal tokens, right at equal time.

    A dotted line marks the end of the shortest run, where the table compares them.
    """
    from matplotlib.figure import Figure

    measure = common_measure(runs)
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
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


def check_picture(picture: Path) -> None:
    """Raise Refused for a picture whose folder does not exist, or of an unknown kind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if not picture.parent.is_dir():
        raise Refused(f"--output {picture}: the folder {picture.parent} does not exist")
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if picture.suffix[1:].lower() not in kinds:
        raise Refused(f"--output {picture}: expected a name that ends in one of .{', .'.join(kinds)}")


def main() -> None:
    """Compare the learning curves of several runs, at equal tokens and at equal time."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a recipe, a folder or a metrics.jsonl")
    parser.add_argument("--output", type=Path, default=Path("comparison.png"), metavar="PICTURE")
    arguments = parser.parse_args()
    with errors_in_one_line("curves"):
        check_picture(arguments.output)
        names = short_names(arguments.runs)
        runs = {name: read_run(run) for name, run in zip(names, arguments.runs, strict=True)}
        print(comparison(runs), end="")
        overlay(runs, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
