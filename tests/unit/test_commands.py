"""Commands and files that documentation, docstrings and messages name exist."""

import re
import subprocess

import pytest
from recipe.project import ROOT

SUFFIXES = (".md", ".py", ".sh", ".toml", ".json", "Dockerfile")
# Tests name files that they make up.
LEFT_OUT = ("tests/unit/", "tests/stages/", "tests/faults/")
listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
FILES = [
    path
    for path in listed.splitlines()
    if path.endswith(SUFFIXES) and not path.startswith(LEFT_OUT) and (ROOT / path).is_file()
]
pytestmark = pytest.mark.skipif(not FILES, reason="not a git checkout")


def named(pattern):
    """Pairs (what matches `pattern`, the file that contains it) in FILES."""
    return {
        (found, path) for path in FILES for found in re.findall(pattern, (ROOT / path).read_text("utf-8"))
    }


def test_modules_that_are_run_exist_and_can_be_run():
    commands = named(r"-m (recipe\.[a-z_.]*[a-z_])")
    assert len(commands) > 5
    for module, path in commands:
        file = ROOT / "pretrain" / (module.replace(".", "/") + ".py")
        assert file.is_file(), f"{path}: python -m {module}"
        assert '__name__ == "__main__"' in file.read_text("utf-8"), f"{path}: python -m {module}"


def test_scripts_and_modules_that_are_named_exist():
    names = named(
        r"(?<![\w/.-])((?:pretrain/|fine-tuning/|tests/(?:bench|unit|stages|faults)/)[\w/.-]+\.(?:py|sh))\b"
    )
    names |= {
        (f"pretrain/{name}", path)
        for name, path in named(r"(?<![\w/.-])(recipe/[a-z_/]+\.(?:py|json|html))\b")
    }
    assert len(names) > 50
    missing = sorted(f"{path}: {name}" for name, path in names if not (ROOT / name).is_file())
    assert not missing, missing
