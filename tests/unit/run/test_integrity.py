"""The files of a finished stage are those that it has written, or nothing reads them."""

import subprocess
import sys

import pytest
from recipe.project import Refused, read_record, write_json
from recipe.run.integrity import damage, describe_files, parts_read, require_whole


@pytest.fixture
def folder(tmp_path):
    """The output of a stage: two files, one of them below, and files that no stage reads."""
    folder = tmp_path / "mini/02_dataset"
    (folder / "below").mkdir(parents=True)
    (folder / "train-a.parquet").write_bytes(bytes(range(256)) * 40)
    (folder / "below/b.json").write_text("{}")
    (folder / "empty").touch()
    (folder / "checkpoints").mkdir()
    for name in ("checkpoints/c", ".seconds", "stop"):
        (folder / name).write_text("1")
    write_json(folder / "stage.json", {"stage": "02_dataset", "files": describe_files(folder)})
    return folder


def test_the_record_names_every_file_that_a_stage_may_read(folder):
    files = read_record(folder)["files"]
    assert sorted(files) == ["below/b.json", "empty", "train-a.parquet"]
    assert files["below/b.json"] == {
        "bytes": 2,
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }
    for name in ("checkpoints/c", ".seconds", "stop"):
        (folder / name).unlink()
    require_whole(folder)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message", "by_size"),
    [
        (lambda folder: (folder / "train-a.parquet").unlink(), "train-a.parquet: missing", True),
        (lambda folder: (folder / "below/b.json").write_text("{ }"), "b.json: 3 bytes, expected 2", True),
        (lambda folder: flip(folder / "train-a.parquet"), "train-a.parquet: damaged or changed", False),
        (lambda folder: (folder / "x.parquet").touch(), "x.parquet: not a file that this stage", True),
    ],
)
def test_damage_is_found_and_the_message_says_what_to_do(folder, change, message, by_size):
    change(folder)
    with pytest.raises(Refused) as refused:
        require_whole(folder)
    for words in (
        message,
        "run_all.sh --recipe mini --from 02 --force",
        "recipe.run.integrity outputs/mini/02",
    ):
        assert words in str(refused.value)
    assert bool(damage(folder, read_record(folder), hashes=False)) == by_size
    below = damage(folder, read_record(folder), ("below/*",))
    assert bool(below) == ("b.json" in message or "x.parquet" in message)


def test_a_changed_folder_can_be_accepted(folder):
    flip(folder / "train-a.parquet")
    line = [sys.executable, "-m", "recipe.run.integrity"]
    done = subprocess.run([*line, str(folder)], capture_output=True, text=True, check=True)
    assert "accepted: train-a.parquet\n" in done.stdout and "now stale" in done.stdout
    require_whole(folder)
    done = subprocess.run([*line, str(folder)], capture_output=True, text=True, check=True)
    assert "no file has changed" in done.stdout
    done = subprocess.run([*line, str(folder.parent)], capture_output=True, text=True)
    assert done.returncode == 2 and "the folder of a finished stage" in done.stderr


def test_a_record_of_an_earlier_release_is_accepted_with_a_warning(folder, capsys):
    write_json(folder / "stage.json", {"stage": "02_dataset"})
    for _ in range(2):
        require_whole(folder)
    assert capsys.readouterr().err.count("recorded no hashes: its files are not checked") == 1


def test_stages_name_what_they_read_of_large_inputs():
    inputs = ("02_dataset", "05_pretrain")
    assert parts_read("06_evaluate", inputs) == {"02_dataset": ("valid-*",), "05_pretrain": ("*",)}
    assert parts_read("06_evaluate", ("01_download", *inputs))["02_dataset"] == ("*",)
    assert parts_read("16_export", inputs)["02_dataset"] == ()
    assert parts_read("04_tokenize", inputs)["02_dataset"] == ("*",)
