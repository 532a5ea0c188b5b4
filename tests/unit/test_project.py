"""What every folder of the package uses: text in Markdown, and JSON Lines."""

import html
import random
import re

import pytest
from markdown_it import MarkdownIt
from recipe.project import markdown_text, read_json_lines


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
