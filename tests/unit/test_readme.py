"""The two READMEs hold the same commands, tables and links; what they name exists; the map is complete."""

import ast
import re

import pytest
from recipe.project import ROOT

FOLDERS = (
    "corpus",
    "config",
    "tokenization",
    "model",
    "conversations",
    "evaluation",
    "evaluation/tasks",
    "training",
    "export",
    "run",
)
BOTH = ("README.md", "README.ja.md")
COMMAND = re.compile(r"(?:bash|\.venv/bin/\S+|cp|\$\{EDITOR:-nano\}|RECIPE_PYTHON=\S+) [^`#|]*")


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def commands(text: str) -> list[str]:
    """The commands of code blocks and of inline code, without comments."""
    return [found.strip() for found in COMMAND.findall(text)]


def tables(text: str) -> list[int]:
    """The number of rows of each table, its head included."""
    return [len(block.splitlines()) for block in re.findall(r"(?:^\|.*\n)+", text, re.M)]


def links(text: str) -> set[str]:
    return set(re.findall(r"\]\(([^)#]+)\)", text)) - set(BOTH)


def test_both_hold_the_same_commands_in_the_same_order():
    english, japanese = (
        commands(re.sub(r"^> .*|^\*\*日本語.*(?:\n.+)*", "", read(name), flags=re.M)) for name in BOTH
    )
    assert english == japanese and len(english) > 30


def test_both_hold_the_same_tables_and_links():
    english, japanese = map(read, BOTH)
    assert tables(english) == tables(japanese)
    assert links(english) == links(japanese)


@pytest.mark.parametrize("name", BOTH)
def test_every_linked_file_and_every_script_exists(name):
    text = read(name)
    scripts = set(re.findall(r"(?:pretrain|fine-tuning|tests)/[\w./-]+\.(?:py|sh)", text))
    missing = sorted(path for path in links(text) | scripts if not (ROOT / path).exists())
    assert not missing


def test_the_readme_is_a_first_reading():
    assert len(read("README.md").splitlines()) <= 200


@pytest.mark.parametrize("name", BOTH)
def test_nothing_is_left_to_fill_in(name):
    assert "@@" not in read(name)


def module_map() -> str:
    """The modules of the package by folder, each with the first line of its docstring."""
    lines = []
    for folder in ("", *FOLDERS):
        lines += [f"**`{folder or 'recipe'}/`**", "", "| module | what it is |", "|---|---|"]
        for path in sorted((ROOT / "pretrain/recipe" / folder).glob("[!_]*.py")):
            doc = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
            name = f"[{path.stem}]({folder + '/' if folder else ''}{path.name})"
            lines.append(f"| {name} | {' '.join(doc.split(chr(10) * 2)[0].split())} |")
        lines.append("")
    return "\n".join(lines)


def test_the_map_of_the_code_lists_every_module():
    assert module_map() in read("pretrain/recipe/README.md"), f"the map should be:\n\n{module_map()}"
