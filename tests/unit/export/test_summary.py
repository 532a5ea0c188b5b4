"""The table of finished stages."""

import json
import subprocess
import sys

from recipe.export import summary


def test_summary_adds_up(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "OUTPUTS", tmp_path / "outputs")
    monkeypatch.setattr(summary, "ROOT", tmp_path)
    for name, seconds in (("01_a", 1.5), ("02_b", 2.0)):
        folder = tmp_path / "outputs/r" / name
        folder.mkdir(parents=True)
        record = {
            "stage": name,
            "seconds": seconds,
            "peak_memory_bytes": 3 << 20,
            "headline": f"did {name}",
        }
        (folder / "stage.json").write_text(json.dumps(record))
    (tmp_path / "outputs/r/02_b/curve.png").write_text("")
    config = {"instruction": {"pairs": {}}}
    (tmp_path / "outputs/r/12_finetune").mkdir()  # of before the pairs were removed
    (tmp_path / "outputs/r/12_finetune/learning_curve.png").touch()
    (tmp_path / "outputs/r/12_finetune/stage.json").write_text(json.dumps(record))
    text = summary.summary("r", config)
    assert "02_b" in text and "3 MiB" in text and "did 01_a" in text
    assert text.splitlines()[3].split() == ["total", "3.5"]
    assert text.endswith("outputs/r/02_b/curve.png")


def test_a_recipe_that_does_not_exist_is_one_line():
    command = [sys.executable, "-m", "recipe.export.summary", "--recipe", "nosuch"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("summary: error: ")
    assert result.stderr.count("\n") == 1


def test_a_stage_that_is_older_than_its_input_is_marked():
    """05 was redone: 06 is of the model before, and so is what was made from 12. 01 does not count."""
    inputs = {
        "01_download": [],
        "02_dataset": ["01_download"],
        "05_pretrain": ["02_dataset"],
        "06_evaluate": ["02_dataset", "05_pretrain"],
        "12_finetune": ["05_pretrain"],
        "14_evaluate": ["02_dataset", "12_finetune"],
    }
    hours = (9, 2, 5, 4, 4, 6)
    records = [
        {
            "stage": stage,
            "headline": "done",
            "wanted": {"inputs": dict.fromkeys(names, "")},
            "finished": f"2026-01-01T0{hour}:00:00+0900",
        }
        for (stage, names), hour in zip(inputs.items(), hours, strict=True)
    ]
    note = "done (older than 05_pretrain)"
    assert summary.headlines(records) == ["done", "done", "done", note, note, note]
