"""The life of a stage: skipped, stale, locked, published whole or not at all."""

import subprocess
import sys

import pytest
from recipe import project
from recipe.run import freshness, stage


def test_differences_name_the_keys():
    old = {"config": {"pretrain": {"a": 1, "b": 2}}, "inputs": {"x": "1"}}
    new = {"config": {"pretrain": {"a": 1, "b": 3, "c": 4}}, "inputs": {"x": "1"}}
    assert freshness.differences(old, new) == ["config.pretrain.b: 2 -> 3", "config.pretrain.c: null -> 4"]
    assert freshness.differences(new, new) == []


def test_lock_names_its_holder_and_dies_with_it(tmp_path):
    path = tmp_path / ".lock"
    code = (
        f"import sys, time; sys.path.insert(0, {str(project.ROOT / 'pretrain')!r}); from recipe.run.stage "
        f"import _lock\n"
        f"from pathlib import Path\nwith _lock(Path({str(path)!r}), 'first'): print('held', flush=True); "
        f"time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(project.Refused, match=rf"process {holder.pid} .*first"),
        stage._lock(path, "second"),
    ):
        pass
    holder.kill()
    holder.wait()
    with stage._lock(path, "second"):  # taken over without ado
        pass


def test_publication_replaces_the_old_output_whole(tmp_path):
    work, final = tmp_path / ".s.work", tmp_path / "s"
    for round_number in range(2):
        work.mkdir()
        (work / "a").write_text(str(round_number))
        (work / ".wanted.json").write_text("{}")
        stage._publish(work, final)
        assert [path.name for path in final.iterdir()] == ["a"]
        assert (final / "a").read_text() == str(round_number)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


def test_linked_copy_survives_the_original(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c").write_text("x")
    stage._link_tree(tmp_path / "a", tmp_path / "copy")
    (tmp_path / "a/b/c").unlink()
    assert (tmp_path / "copy/b/c").read_text() == "x"


def test_full_disk_names_path_and_free_bytes(monkeypatch, capsys, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr(stage, "_run", full)
    monkeypatch.setattr(sys, "argv", ["02_dataset.py"])
    with pytest.raises(SystemExit) as caught:
        stage.run_stage("02_dataset.py", "doc", lambda stage: None, ())
    assert caught.value.code == 1
    assert f"cannot use {tmp_path / 'x'}: No space left on device" in capsys.readouterr().err


def test_kill_between_the_renames_loses_nothing(tmp_path):
    work, final, old = tmp_path / ".s.work", tmp_path / "s", tmp_path / ".s.old"
    old.mkdir()
    (old / "a").write_text("old")
    stage._finish_publication(work, final, {})
    assert (final / "a").read_text() == "old"
    final.rename(old)
    work.mkdir()
    (work / "a").write_text("new")
    project.write_json(work / "stage.json", {"wanted": {"x": 1}})
    stage._finish_publication(work, final, {"x": 1})
    assert (final / "a").read_text() == "new" and not old.exists() and not work.exists()
