"""Runs laid over each other at equal tokens and at equal time."""

import json
import subprocess
import sys

import pytest
from recipe.project import Refused
from recipe.training import curves


def run(folder, name, rows):
    path = folder / name
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(seconds_per_step, slope, key="eval_bits_per_byte", steps=(10, 20, 30)):
    return [
        {"step": s, "tokens": s * 100_000, "seconds": s * seconds_per_step, key: 3 - slope * s, "loss": 9.0}
        for s in steps
    ]


def test_runs_are_compared_at_equal_tokens_and_at_equal_time():
    """The quick run ends after 3M tokens and 60 s; the slow one, better by token, takes three times as
    long.
    """
    runs = {"quick": rows(2, 0.02), "slow": rows(6, 0.04, steps=(5, 10, 20, 40))}
    lines = curves.comparison(runs).splitlines()
    assert lines[0] == (
        "| run | valid bits/byte at the end | million tokens | minutes | at 3 million tokens | at 1 minutes |"
    )
    # After 3M tokens (step 30): 3 - .02 * 30 and 3 - .04 * 30; after 60 s: step 30 and step 10.
    assert lines[2:] == [
        "| quick | 2.4000 | 3 | 1 | 2.4000 | 2.4000 |",
        "| slow | 1.4000 | 4 | 4 | 1.8000 | 2.6000 |",
    ]


def test_runs_with_different_figures_are_compared_by_what_they_share():
    runs = {"a": rows(1, 0.1), "b": rows(1, 0.1, key="eval_loss")}
    assert curves.common_measure(runs) == "loss"
    assert curves.common_measure({"a": runs["a"]}) == "eval_bits_per_byte"
    with pytest.raises(Refused, match="no figure that all of them have"):
        curves.common_measure(runs | {"empty": []})


def test_nothing_is_invented_outside_a_run():
    points = rows(1, 0.1)
    assert curves.value_at(points, "loss", "tokens", 999_999) is None
    assert curves.value_at(points, "loss", "tokens", 3_000_001) is None
    assert curves.value_at(points[:1], "loss", "tokens", 1_000_000) == 9.0


def test_command_writes_picture_and_table(tmp_path):
    folders = [run(tmp_path, name, rows(n, 0.01 * n)) for n, name in enumerate(("a", "b", "c"), 1)]
    with (folders[0] / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 40, "tok')  # a run that is still written
    picture = tmp_path / "all.png"
    command = [sys.executable, "-m", "recipe.training.curves", *map(str, folders), "--output", str(picture)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [line.split()[1] for line in result.stdout.splitlines()[2:5]] == ["a", "b", "c"]


def test_command_refuses_what_is_no_run(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "recipe.training.curves", "nosuch"], capture_output=True, text=True
    )
    assert result.returncode == 2 and "nosuch: no run" in result.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [("none/a.png", "none does not exist"), ("a.xyz", "ends in one of"), ("a", "ends in one of")],
)
def test_a_picture_that_cannot_be_written_is_refused_before_the_table(
    tmp_path, monkeypatch, capsys, name, words
):
    folder = run(tmp_path, "run", rows(1, 0.1))
    monkeypatch.setattr(sys, "argv", ["curves", str(folder), "--output", str(tmp_path / name)])
    with pytest.raises(SystemExit) as refused:
        curves.main()
    shown = capsys.readouterr()
    assert refused.value.code == 2 and not shown.out and words in shown.err


def test_runs_are_called_by_what_tells_them_apart():
    paths = ["/x/outputs/tiny/05_pretrain", "/x/outputs/large/05_pretrain"]
    assert curves.short_names(paths) == ["tiny", "large"]
    assert curves.short_names(["tiny", "old/tiny/05_pretrain"]) == ["tiny", "old/tiny/05_pretrain"]
    assert curves.short_names(["/x/outputs/tiny"]) == ["/x/outputs/tiny"]


def test_a_run_without_a_figure_there_is_said_to_have_none():
    runs = {"short": rows(1, 0.1, steps=(5,)), "long": rows(1, 0.1)}
    assert curves.comparison(runs).splitlines()[3].endswith("| not measured yet | not measured yet |")


METRICS = [
    {"step": 40, "tokens": 4_000_000, "loss": 4.5, "learning_rate": 3e-4},
    {"step": 42, "tokens": 4_200_000, "eval_loss": 4.25},
    {"step": 80, "tokens": 8_000_000, "loss": 4.15, "learning_rate": 1e-4},
    {"step": 85, "tokens": 8_500_000, "eval_loss": 3.98},
]


def test_metrics_of_the_evaluations_are_a_table():
    """The last row reads 4.15/3.98 (63.4/53.5), as published systems write it."""
    assert curves.metrics_table(METRICS).splitlines() == [
        "| step | train loss | valid loss | train perplexity | valid perplexity |",
        "|---:|---:|---:|---:|---:|",
        "| 42 | 4.5000 | 4.2500 | 90.02 | 70.11 |",
        "| 85 | 4.1500 | 3.9800 | 63.43 | 53.52 |",
    ]
    preferences = curves.metrics_table(METRICS, with_perplexity=False).splitlines()
    assert preferences[0] == "| step | train loss | valid loss |" and preferences[-1].count("|") == 4


def test_a_table_has_rows_without_a_training_loss_and_after_divergence():
    rows = [{"step": 0, "eval_loss": 5.0}, {"step": 1, "loss": 1e4}, {"step": 1, "eval_loss": 1e4}]
    lines = curves.metrics_table(rows).splitlines()
    assert lines[2] == "| 0 |  | 5.0000 |  | 148.41 |"
    assert lines[3] == "| 1 | 10000.0000 | 10000.0000 | inf | inf |"


@pytest.mark.parametrize("with_perplexity", [True, False])
def test_the_learning_curve_shows_the_learning_rate(tmp_path, monkeypatch, with_perplexity):
    from matplotlib.figure import Figure

    drawn, save = {}, Figure.savefig

    def savefig(figure, *where, **options):
        save(figure, *where, **options)
        for axis in figure.axes:
            drawn[axis.get_ylabel()] = [line.get_ydata().tolist() for line in axis.get_lines()]

    monkeypatch.setattr(Figure, "savefig", savefig)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    curves.write_curves(tmp_path, "a run", with_perplexity)
    assert drawn["learning rate"] == [[3e-4, 1e-4]]
    assert drawn["loss (nats per token)" if with_perplexity else "loss"] == [[4.5, 4.15], [4.25, 3.98]]
    assert ("perplexity" in drawn) == with_perplexity
    assert (tmp_path / "learning_curve.png").stat().st_size > 10_000
    page = (tmp_path / "metrics.md").read_text()
    assert page == f"# a run\n\n{curves.metrics_table(METRICS, with_perplexity)}"
