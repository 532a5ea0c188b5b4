"""An output folder on a mounted drive, which may lack what a disk has."""

import errno
import os

import pytest
from recipe.project import Refused
from recipe.run import publication
from recipe.run.publication import hold


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
