"""The import rule of pretrain/recipe: folders import only from the folders above them, without circles."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pretrain/recipe"
# From the top (imports no other folder) to the bottom. Modules outside the folders are above all of them.
FOLDERS = ["corpus", "config", "tokenization", "model", "conversations"]
FOLDERS += ["evaluation", "training", "export", "run"]
WITHOUT_TORCH = ("project", "config", "corpus")


def imports():
    """{module: what it imports anywhere in its file, also inside functions and for types only}."""
    files = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    found = {}
    for name, path in files.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}:{node.lineno}: write the whole name of the module"
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                found[name] |= {module if module in files else node.module for module in full}
    return found


def depth(module):
    folder = module.split(".")[1] if module.count(".") else ""
    return FOLDERS.index(folder) if folder in FOLDERS else -1


def test_a_folder_imports_only_from_folders_above_it():
    arrows = [(name, other) for name, others in imports().items() for other in others]
    assert not [(a, b) for a, b in arrows if b.startswith("recipe.") and depth(b) > depth(a)]


def test_there_is_no_circle_of_imports():
    graph = imports()

    def reached(module, seen):
        for other in graph.get(module, set()) - seen:
            seen.add(other)
            reached(other, seen)
        return seen

    assert not [module for module in graph if module in reached(module, set())]


def test_configuration_and_corpus_never_import_torch():
    modules = {m: o for m, o in imports().items() if m.split(".")[1:2] and m.split(".")[1] in WITHOUT_TORCH}
    assert len(modules) > len(WITHOUT_TORCH)
    assert not [m for m, others in modules.items() if "torch" in {other.split(".")[0] for other in others}]


def test_the_folders_are_those_of_the_rule():
    assert sorted(FOLDERS) == sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py"))
