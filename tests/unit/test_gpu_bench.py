"""The bench of a GPU measures `small` as it is shipped, and says how long its pretraining would take."""

import re

from bench import gpu
from conftest import ROOT
from recipe.config.recipe import load_recipe


def test_small_is_measured_at_full_size_and_its_hours_are_extrapolated(monkeypatch, capsys):
    asked = []

    def trained(config, steps, limit):
        asked.append((config, steps))
        active = {"micro_batch": 8, "accumulation": 8, "parameters": 109_531_392}
        figures = {"tokens_per_second": 1e5, "mfu": 0.4, "first": 30.0, "peak_memory_bytes": 7 * 2**30}
        return {"outcome": "ok", "active": active} | figures

    monkeypatch.setattr(gpu, "trained", trained)
    gpu.whole_recipe("small")
    assert asked == [(load_recipe("small"), 200)]
    # 18,000 x 64 x 1,024 tokens at 100,000 a second.
    row = r"\| 109,531,392 \| 100,000 \| 40% \| 30 s \| 7\.00 \| \d\.\d\d \| 2\.73 \|"
    assert re.search(row, capsys.readouterr().out)


def test_gpu_sh_runs_each_section_and_shows_its_table():
    script = (ROOT / "tests/bench/gpu.sh").read_text("utf-8")
    jobs = set(re.findall(r"^job (\w+) ", script, re.M))
    (shown,) = re.findall(r"^for name in (.+); do", script, re.M)
    assert jobs == set(shown.split()) >= {"training", "small", "idle", "documents"}
