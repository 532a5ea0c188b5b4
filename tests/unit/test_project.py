"""What every folder of the package uses: text in Markdown, and files that are whole or not there."""

import html
import random
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from recipe.project import (
    ROOT,
    RecipeError,
    Refused,
    append_json_line,
    disk_of,
    free_bytes,
    known_record,
    markdown_text,
    naming_full_disk,
    read_json_lines,
    read_record,
    read_state,
    user_path,
    write_json,
)


def shown(text):
    """A text as a reader sees it in the cell of a table."""
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    page = parser.render(f"| a |\n|---|\n| {markdown_text(text)} |\n")
    (cell,) = re.findall("<td>(.*?)</td>", page)
    assert "<" not in cell  # no tag
    return html.unescape(cell)


@pytest.mark.parametrize(
    "text", ["日本で一番高い山は?", "a.b-c(1)!", "snake_case", "3 < 4 & 5", "C:\\dir", "#1 + {x} = 'y'"]
)
def test_text_that_markdown_shows_as_it_is_stays_as_it_is(text):
    assert markdown_text(text) == text
    assert shown(text) == text


def test_any_text_is_shown_as_it_is_written():
    for text in ("~~a~~", "*a*", "_a_", "__a__", "[a](b)", "`a`", "a|b", "<b>", "&amp;", "\\*", "a\\"):
        assert shown(text) == text
    draw = random.Random(1)
    marks = "\\`*_[]<>&|~!()#-+.:;?/ab1山 "
    for _ in range(3000):
        text = "".join(draw.choices(marks, k=draw.randint(1, 12)))
        assert shown(text) == " ".join(text.split()), text
    assert shown("一行目\n二行目\t<b>&amp;") == "一行目 二行目 <b>&amp;"


def test_json_lines_may_hold_other_line_separators_and_an_incomplete_last_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "一\u2028二\x85三"}\n{"text": "四"}\n{"tex', "utf-8")
    assert read_json_lines(path) == [{"text": "一\u2028二\x85三"}, {"text": "四"}]


def test_lines_that_cannot_be_read_are_left_out_and_reported(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}{"a":\n[1]\n\xff\n{"a": 3}\n{"a": {"b": 1}')
    assert read_json_lines(path) == [{"a": 1}, {"a": 3}]
    said = capsys.readouterr().err
    assert [f"line {n} cannot be read" in said for n in range(1, 7)] == [n in (2, 3, 4) for n in range(1, 7)]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """A link to /dev/full in place of the .part makes the disk full."""
    path = tmp_path / "state.json"
    write_json(path, {"old": 1})
    (tmp_path / "state.json.part").symlink_to("/dev/full")
    with pytest.raises(RecipeError) as full:
        write_json(path, {"new": 2})
    size = len('{\n  "new": 2\n}\n')
    free = f"{size} bytes are needed, {free_bytes(tmp_path):,}"[:20]
    for words in (f"{path}: No space left on device: ", free, f"on the disk mounted at {disk_of(tmp_path)}."):
        assert words in str(full.value)
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]
    assert read_state(path) == {"old": 1}
    write_json(path, {"new": 2})
    assert read_state(path) == {"new": 2}


def test_a_file_that_cannot_be_renamed_leaves_no_part(tmp_path):
    (tmp_path / "state.json").mkdir()
    with pytest.raises(IsADirectoryError):
        write_json(tmp_path / "state.json", {"new": 2})
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]


def test_a_row_after_a_line_that_was_cut_short_is_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_json_line(path, {"a": 1})
    with path.open("a") as handle:
        handle.write('{"a": 2')
    for value in (3, 4):
        append_json_line(path, {"a": value})
    assert read_json_lines(path) == [{"a": 1}, {"a": 3}, {"a": 4}]


def test_appending_names_the_file_on_a_full_disk(tmp_path):
    (tmp_path / "rows.jsonl").symlink_to("/dev/full")
    with pytest.raises(RecipeError, match=r"rows.jsonl: No space left on device: 9 bytes are needed"):
        append_json_line(tmp_path / "rows.jsonl", {"a": 1})


def test_failed_writes_of_libraries_are_a_full_disk_and_other_errors_are_not(tmp_path):
    """What safetensors, torch and numpy say has no errno; these are their messages."""
    for message in (
        "Error while serializing: I/O error: No space left on device (os error 28)",
        "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534",
        "basic_ios::clear: iostream error",
        "100000 requested and 2484 written",
    ):
        with pytest.raises(RecipeError, match="its size is not known before"), naming_full_disk(tmp_path):
            raise RuntimeError(message)
    for error in (RuntimeError("shapes differ"), PermissionError(13, "denied"), RecipeError("os error 28")):
        with pytest.raises(type(error)) as same, naming_full_disk(tmp_path):
            raise error
        assert same.value is error


def test_state_that_cannot_be_read_counts_as_absent(tmp_path, capsys):
    path = tmp_path / "state.json"
    assert read_state(path) is None and not capsys.readouterr().err
    for content in (b"", b"{", b"null", b"\xff", b"[" * 100_000, b"[1]", b'{"b": 1}'):
        path.write_bytes(content)
        assert read_state(path, "a") is None
    assert capsys.readouterr().err.count("cannot be read, so it counts as absent") == 1  # said once
    path.write_text('{"a": 1}')
    assert read_state(path, "a") == {"a": 1}
    path.unlink()
    path.mkdir()  # a folder of this name
    assert read_state(path, "a") is None


def test_a_record_of_a_stage_must_have_what_is_read(tmp_path, capsys):
    folder = tmp_path / "mini/03_tokenizer"
    folder.mkdir(parents=True)
    keys, whole = ("wanted", "figures"), {"wanted": {"config": {}, "inputs": {}}, "figures": {}}
    write_json(folder / "stage.json", whole)
    assert read_record(folder, *keys) == known_record(folder, *keys) == whole
    for damaged in (
        None,
        [],
        {},
        {"wanted": whole["wanted"]},
        whole | {"wanted": {}},
        whole | {"figures": None},
    ):
        write_json(folder / "stage.json", damaged)
        with pytest.raises(Refused, match=r"stage.json: cannot be read. .*--recipe mini --from 03 --force"):
            read_record(folder, *keys)
        assert known_record(folder, *keys) is None
    assert capsys.readouterr().err.count("this stage is passed over") == 1


def test_paths_of_users_begin_at_home_or_in_the_project():
    assert user_path("~/a") == Path.home() / "a" and user_path("/a") == Path("/a")
    assert user_path("a") == ROOT / "a"
    assert not user_path("~nosuch/x").exists()
