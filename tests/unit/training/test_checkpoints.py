"""Checkpoints: a damaged one is found, set aside and never used; good ones are kept."""

import json
import shutil

import pytest
from recipe.project import Refused
from recipe.training import checkpoints


def checkpoint(folder, step, finished=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (path / name).write_bytes(f"{name} {step}".encode() * 50)
    if finished:
        checkpoints.write_manifest(path)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def flip(path):
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


def test_a_half_written_checkpoint_is_deleted_and_the_newest_complete_one_is_used(tmp_path, capsys):
    good = checkpoint(tmp_path, 90)
    checkpoint(tmp_path, 100, finished=False)
    checkpoint(tmp_path, 80, finished=False)
    assert checkpoints.newest_good_checkpoint(tmp_path) == good
    assert "checkpoint-100 is not used: it was not completely written" in capsys.readouterr().out
    assert names(tmp_path) == ["checkpoint-90"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("kind", ["missing", "truncated", "bit"])
def test_a_damaged_checkpoint_is_found_and_set_aside(tmp_path, capsys, name, kind):
    good, bad = checkpoint(tmp_path, 90), checkpoint(tmp_path, 100)
    path = bad / name
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        flip(path)
    assert checkpoints.newest_good_checkpoint(tmp_path) == good
    assert f"checkpoint-100 is not used: {name}" in capsys.readouterr().out
    assert names(tmp_path) == ["checkpoint-90", "damaged-checkpoint-100"]


def without(part):
    def change(path):
        path.write_text(json.dumps({n: f for n, f in json.loads(path.read_text()).items() if n != part}))

    return change


def as_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "change",
    [
        *(lambda path, text=text: path.write_text(text) for text in ("{}", "[]", "null", "7", '{"a', "")),
        lambda path: path.write_text('{"model.safetensors": null}'),
        lambda path: path.write_text('{"model.safetensors": {"bytes": 5}}'),
        lambda path: path.write_bytes(b"\xff\x00"),
        as_folder,
        *map(without, ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")),
    ],
)
def test_an_odd_manifest_is_damage(tmp_path, capsys, change):
    good = checkpoint(tmp_path, 90)
    change(checkpoint(tmp_path, 100) / checkpoints.MANIFEST)
    assert checkpoints.newest_good_checkpoint(tmp_path) == good
    assert "checkpoint-100 is not used: manifest.json is damaged" in capsys.readouterr().out


def test_damaged_checkpoints_do_not_push_out_good_ones(tmp_path):
    """After two damaged ones, the training saves at lower steps again."""
    checkpoint(tmp_path, 10)
    for step in (90, 100):
        flip(checkpoint(tmp_path, step) / "optimizer.pt")
    assert checkpoints.newest_good_checkpoint(tmp_path).name == "checkpoint-10"
    for step in (20, 30):
        checkpoint(tmp_path, step)
        checkpoints.delete_old(tmp_path, 2)
    assert checkpoints.newest_good_checkpoint(tmp_path).name == "checkpoint-30"
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == [
        "checkpoint-30",
        "checkpoint-20",
    ]


def test_without_a_good_checkpoint_the_training_is_refused_and_nothing_is_changed(tmp_path):
    for step, name in ((90, "optimizer.pt"), (100, "rng_state.pth")):
        flip(checkpoint(tmp_path, step) / name)
    for _ in range(2):
        with pytest.raises(Refused) as refused:
            checkpoints.newest_good_checkpoint(tmp_path)
        for words in ("checkpoint-100: rng_state.pth is damaged", "checkpoint-90: optimizer.pt", "--force"):
            assert words in str(refused.value)
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-90"]


def test_other_names_are_ignored(tmp_path):
    good = checkpoint(tmp_path, 90)
    shutil.copytree(good, tmp_path / "checkpoint-100-copy")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-200").write_text("a file")
    (good / "notes.txt").write_text("added later")
    before = names(tmp_path)
    assert checkpoints.newest_good_checkpoint(tmp_path) == good
    checkpoints.delete_old(tmp_path, 1)
    assert names(tmp_path) == before


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert checkpoints.newest_good_checkpoint(tmp_path) is None
