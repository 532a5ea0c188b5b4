"""Checkpoints: a damaged one is found and not used."""

import pytest
from recipe.training import checkpoints


def checkpoint(folder, step, finished=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (path / name).write_bytes(f"{name} {step}".encode() * 50)
    if finished:
        checkpoints.write_manifest(path)
    return path


def test_the_newest_complete_checkpoint_is_used(tmp_path, capsys):
    good = checkpoint(tmp_path, 90)
    checkpoint(tmp_path, 100, finished=False)
    assert checkpoints.newest_good_checkpoint(tmp_path) == good
    assert "checkpoint-100 is not used: it was not completely written" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("kind", ["missing", "truncated", "bit"])
def test_damage_is_found(tmp_path, capsys, name, kind):
    good, bad = checkpoint(tmp_path, 90), checkpoint(tmp_path, 100)
    path = bad / name
    content = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[:-1])
    else:
        content[7] ^= 1
        path.write_bytes(content)
    assert checkpoints.newest_good_checkpoint(tmp_path) == good
    assert f"checkpoint-100 is not used: {name}" in capsys.readouterr().out


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert checkpoints.newest_good_checkpoint(tmp_path) is None
