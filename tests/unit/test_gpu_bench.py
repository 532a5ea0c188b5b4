"""The bench of a GPU measures `small` as it is shipped, and says how long its pretraining would take."""

import re

import pytest
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


def test_gpu_sh_runs_each_section():
    script = (ROOT / "tests/bench/gpu.sh").read_text("utf-8")
    sections = re.findall(r"^- ``(\w+)``", gpu.__doc__, re.M)
    assert sorted(re.findall(r"^  bench (\w+) \d+$", script, re.M)) == sorted(sections)
    assert {"training", "small", "documents", "muon"} <= set(sections)


def test_a_row_is_printed_when_it_is_measured_and_the_ratio_is_to_the_peer(monkeypatch, capsys):
    """So that a job that is cut off leaves what it has."""
    figures = {"first": 9.0, "tokens_per_second": 3e5, "peak_memory_bytes": 2**30, "outcome": "ok"}
    figures |= {"gpu_percent": 97.0, "watts": 650.0, "idle": 0.021, "ms": 170.0}
    monkeypatch.setattr(gpu, "ours", lambda *_: figures)

    def apart(name, *_):
        if name == gpu.EAGER:
            raise TimeoutError
        return {"step": gpu.TOKENS / 2e5, "first": 30.0, "memory": 2**31}

    monkeypatch.setattr(gpu, "stock_apart", apart)
    with pytest.raises(TimeoutError):
        gpu.compare(gpu.BLOCK, gpu.SHALLOW, (gpu.PEER, "ours", gpu.EAGER))
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert re.fullmatch(r"\| stock, compiled \| 200,000 \| 1\.00 \| \S+% \| 30 s \| 2\.0 \|", rows[0])
    assert re.fullmatch(r"\| ours \| 300,000 \| 1\.50 \| \S+% \| 9 s \| 1\.0 \|", rows[1])
    gpu.compare(gpu.BLOCK, gpu.SHALLOW, (gpu.PEER, "ours"))
    out = capsys.readouterr().out
    assert "GPU: 97 % utilisation, 650 W (NVML)" in out and "170 ms: 2.1%" in out
