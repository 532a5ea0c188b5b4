"""An output folder on a mounted drive, which may lack what a disk has."""

import errno
import os
import stat

import pytest
from recipe import project
from recipe.endings import errors_in_one_line
from recipe.project import RECORD, RecipeError, Refused, write_json
from recipe.run import publication
from recipe.run.integrity import damage, describe_files
from recipe.run.publication import RESULT, finish_publication, hold, publish, write_last


def test_a_drive_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    """The system call fails as on a file system that has no locks."""

    def no_locks(descriptor, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(publication.fcntl, "flock", no_locks)
    with hold(tmp_path, "05_pretrain"):
        assert "(05_pretrain)" in (tmp_path / ".lock").read_text()
    assert "this file system has no locks (Function not implemented)" in capsys.readouterr().err


def test_a_folder_in_use_is_still_refused(tmp_path):
    with (
        hold(tmp_path, "05_pretrain"),
        pytest.raises(Refused, match=r"is in use by process \d+ .*\(05_pretrain\)"),
        hold(tmp_path, "a second run"),
    ):
        pass


def test_the_scaffold_of_phases_is_no_output_and_goes_when_the_stage_is_published(tmp_path):
    """Not before the record is written: a kill in between would cost the work of all phases."""
    for name in ("logs/read/stats.json", "clean/0.parquet", "parts/0.bin", "train.bin"):
        (tmp_path / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / name).write_text("x")
    assert list(describe_files(tmp_path / "work")) == ["train.bin"]
    publish(tmp_path / "work", tmp_path / "final")
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["train.bin"]


@pytest.mark.parametrize("unfinished", [True, False])
def test_only_an_unfinished_training_is_set_aside(tmp_path, capsys, unfinished):
    """What an interrupted copy of a finished training has left is none, and its checkpoints are copies."""
    work, aside = tmp_path / ".05_pretrain.work", tmp_path / ".05_pretrain.aside"
    (work / "checkpoints/checkpoint-1").mkdir(parents=True)
    aside.mkdir()
    (aside / "earlier").touch()
    if unfinished:
        write_json(work / publication.WANTED, {})
    publication.clear(work)
    assert not work.exists()
    assert (aside / "checkpoints").exists() == unfinished != (aside / "earlier").exists()
    assert ("starts over" in capsys.readouterr().out) == unfinished


def test_what_says_that_a_folder_is_complete_comes_after_its_files(tmp_path, monkeypatch):
    """Also on the disk: after a power cut there is no result without the weights."""
    monkeypatch.setattr(publication, "fsync_tree", lambda folder: flushed.extend(folder.iterdir()))
    flushed = []
    (tmp_path / "model.safetensors").write_text("weights")
    write_last(tmp_path / RESULT, {"steps": 1})
    assert flushed == [tmp_path / "model.safetensors"] and (tmp_path / RESULT).exists()


def test_a_killed_publication_whose_files_were_lost_is_not_completed(tmp_path, capsys):
    work, final = tmp_path / ".05_pretrain.work", tmp_path / "05_pretrain"
    work.mkdir()
    write_json(work / RESULT, {})
    (work / "model.safetensors").write_text("weights")
    wanted = {"config": {}, "inputs": {}}
    write_json(work / RECORD, {"wanted": wanted, "files": describe_files(work)})
    (work / "model.safetensors").write_text("")
    finish_publication(work, final, lambda seen: True, lambda record: damage(work, record, hashes=False))
    assert [path.name for path in work.iterdir()] == ["model.safetensors"] and not final.exists()
    assert "0 bytes, expected 7, so this result is not used" in capsys.readouterr().err


@pytest.mark.parametrize("replaces", [True, False])
def test_what_a_publication_killed_at_its_end_has_left_is_removed(tmp_path, monkeypatch, replaces):
    work, final = tmp_path / ".05_pretrain.work", tmp_path / "05_pretrain"
    for folder in (work, publication.set_aside(work), *([final] if replaces else [])):
        folder.mkdir()
    for name in (publication.WANTED, RECORD):
        write_json(work / name, {"wanted": {}})
    with monkeypatch.context() as killed:
        killed.setattr(publication, "_remove_rest", lambda *folders: None)
        publish(work, final)
    assert publication.set_aside(work).exists()
    finish_publication(work, final, lambda seen: True, lambda record: "")
    assert [path.name for path in tmp_path.iterdir()] == ["05_pretrain"]
    assert [path.name for path in final.iterdir()] == [RECORD]


def test_what_was_set_aside_stays_until_the_stage_is_published(tmp_path):
    work, final = tmp_path / ".05_pretrain.work", tmp_path / "05_pretrain"
    publication.set_aside(work).mkdir()
    final.mkdir()
    write_json(final / RECORD, {"wanted": {}})
    finish_publication(work, final, lambda seen: True, lambda record: "")
    assert publication.set_aside(work).exists()


def test_a_drive_that_cannot_flush_a_folder_still_gets_the_output(tmp_path, monkeypatch):
    real = os.fsync

    def files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(project.os, "fsync", files_only)
    work = tmp_path / ".05_pretrain.work"
    (work / "checkpoints").mkdir(parents=True)
    (work / "model").write_text("weights")
    publication.publish(work, tmp_path / "05_pretrain")
    assert (tmp_path / "05_pretrain/model").read_text() == "weights"


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_file_that_cannot_be_flushed_is_not_published(tmp_path, monkeypatch, code):
    def fails(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(project.os, "fsync", fails)
    (tmp_path / "work").mkdir()
    with pytest.raises((OSError, RecipeError)):
        publication.publish(tmp_path / "work", tmp_path / "05_pretrain")
    assert not (tmp_path / "05_pretrain").exists()


def test_a_drive_that_is_gone_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended, errors_in_one_line("05_pretrain"):
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), "/content/drive/a")
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.count("\n") == 1
    assert "cannot use /content/drive/a: Transport endpoint is not connected. The drive does not" in said
