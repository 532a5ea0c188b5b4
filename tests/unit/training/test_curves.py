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


def test_runs_are_called_by_what_tells_them_apart():
    paths = ["/x/outputs/tiny/05_pretrain", "/x/outputs/large/05_pretrain"]
    assert curves.short_names(paths) == ["tiny", "large"]
    assert curves.short_names(["tiny", "old/tiny/05_pretrain"]) == ["tiny", "old/tiny/05_pretrain"]
    assert curves.short_names(["/x/outputs/tiny"]) == ["/x/outputs/tiny"]


def test_a_run_without_a_figure_there_is_said_to_have_none():
    runs = {"short": rows(1, 0.1, steps=(5,)), "long": rows(1, 0.1)}
    assert curves.comparison(runs).splitlines()[3].endswith("| not measured yet | not measured yet |")
