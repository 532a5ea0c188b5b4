"""The notebook of colab-t4: its commands exist, it holds no outputs, and its cells run from clone to chat."""

import ast
import json
import re
import subprocess

import pytest
from recipe.config.recipe import recipes
from recipe.project import CONFIGS, ROOT

NOTEBOOK = CONFIGS / "colab-t4/quick_start.ipynb"


def cells():
    """The code cells by id."""
    found = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return {cell["id"]: "".join(cell["source"]) for cell in found if cell["cell_type"] == "code"}


def test_its_cells_can_be_parsed_and_have_no_outputs(tmp_path):
    for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count")
    for name, source in cells().items():
        if source.startswith("%%bash\n"):
            script = source.removeprefix("%%bash\n")
            assert script.startswith("set -euo pipefail\n"), name  # a failed command stops the notebook
            subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        else:
            ast.parse(source)


def test_its_commands_recipes_and_files_exist():
    """Also each name that it imports from the package."""
    sources = cells()
    assert re.search(r'^RECIPE = "(.+)"', sources["parameters"], re.M)[1] in recipes()
    text = "\n".join(sources.values()).replace("$WORK/", "")
    named = set(re.findall(r"[\w/-]+\.(?:sh|py|txt)\b", text)) - {"/tmp/requirements.txt"}
    assert named >= {"run_all.sh", "requirements.txt"} and all((ROOT / name).is_file() for name in named)
    for module, names in re.findall(r"^from (recipe\.[\w.]+) import (.+)$", sources["load"], re.M):
        tree = ast.parse((ROOT / "pretrain" / f"{module.replace('.', '/')}.py").read_text("utf-8"))
        assert set(names.split(", ")) <= {getattr(node, "name", "") for node in tree.body}
    help_text = subprocess.run(["bash", ROOT / "run_all.sh", "--help"], capture_output=True, text=True).stdout
    assert all(option in help_text for option in ("--recipe", "--dry-run"))
    # "shows": stage and file, as the README's table of stages says.
    shown = re.findall(r'outputs / "(\d\d_\w+)/([\w.]+)"', sources["curves"])
    assert len(shown) == 3
    table = (ROOT / "README.md").read_text("utf-8")
    assert all(f"`{file}`" in table for _, file in shown)


@pytest.mark.extra("notebook")
def test_its_cells_run_from_the_clone_to_the_chat_and_go_on_after_a_cut(make_project, tmp_path):
    """With the recipe `mini`. The first session ends after stage 03; the second one has a fresh clone."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    project = make_project()
    publish(project, tmp_path / "hub")
    project.edit("mini", "pretrain", max_steps=4, eval_steps=2, save_steps=2)
    project.edit("mini", "finetune", max_steps=2)
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "mini"]):
        identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        subprocess.run(["git", *identity, *command], cwd=project.folder, check=True)
    drive = tmp_path / "drive"

    def session(name, end=""):
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        found = {cell.id: cell for cell in notebook.cells}
        found["parameters"].source = (
            f'REPOSITORY = "{project.folder}"\nRECIPE = "mini"\nDRIVE = "{drive}"\n'
            f'WORK = "{tmp_path / name}"\n'
        )
        found["run"].source += end
        return found, NotebookClient(notebook, timeout=600, kernel_name="python3")

    _, client = session("first", " --to 03\nexit 9\n")
    with pytest.raises(CellExecutionError, match="exit status 9"):
        client.execute()
    assert (drive / "outputs/mini/03_tokenizer/stage.json").exists()
    found, client = session("second")
    client.execute()
    said = "".join(output.get("text", "") for output in found["run"].outputs)
    assert re.search(r"^03_tokenizer +done before", said, re.M), said
    assert (drive / "outputs/mini/16_export/README.md").exists()
    assert sum("image/png" in output.get("data", {}) for output in found["curves"].outputs) == 1
    assert [output["name"] for output in found["chat"].outputs] == ["stdout"]


def publish(project, folder):
    """Move the texts and pairs of `mini` to data sets, as those of colab-t4: a clone has new files."""
    for name, path in (("text", "text/a.txt"), ("other", "other.jsonl"), ("pairs", "pairs.json")):
        (folder / name).mkdir(parents=True)
        (project.folder / path).rename(folder / name / path.rpartition("/")[2])
    rows = [{"text": text} for text in (folder / "text/a.txt").read_text("utf-8").split("\n\n")]
    (folder / "text/a.txt").unlink()
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "text/train.jsonl").write_text(lines, "utf-8")
    sources = {"text": {"source": "hub", "dataset": str(folder / "text")}}
    sources["other"] = {"source": "hub", "dataset": str(folder / "other"), "held_out": True}
    project.edit("mini", "dataset", sources=sources)
    project.edit("mini", "instruction", pairs={"mine": {"dataset": str(folder / "pairs")}})
