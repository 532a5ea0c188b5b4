"""setup.sh: what it installs, what it refuses, and that every import has a pinned package."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

LINES = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
PINS = [line.partition(";")[0] for line in LINES]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def executable(path: Path, text: str) -> Path:
    """Write a shell script that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def gpu(folder: Path, capability: str) -> Path:
    """A folder for PATH with an `nvidia-smi` that reports one GPU."""
    return executable(folder / "nvidia-smi", f"echo {capability}\n").parent


def setup(*arguments: str, **environment: str | Path) -> subprocess.CompletedProcess[str]:
    """Run setup.sh with changed environment variables."""
    own = ("RECIPE_PYTHON", "PYTHONPATH", "TORCH_CPU_INDEX")
    clean = {key: value for key, value in os.environ.items() if key not in own}
    return subprocess.run(
        ["bash", str(ROOT / "setup.sh"), *arguments],
        env=clean | {key: str(value) for key, value in environment.items()},
        capture_output=True,
        text=True,
    )


# ---------------------------------------------------------------------------------------------------------
# RECIPE_PYTHON


class Environment:
    """A Python environment that claims to hold packages: only their metadata are there."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.python = folder / "bin/python"
        (self.packages,) = folder.glob("lib/python*/site-packages")

    def add(self, *pins: str) -> None:
        """Add packages, each as NAME==VERSION; another version of a package is replaced."""
        for pin in pins:
            name, version = pin.split("==")
            folder = self.packages / f"{name.replace('-', '_')}-0.dist-info"
            folder.mkdir(exist_ok=True)
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def bare(tmp_path):
    return Environment(tmp_path / "environment")


def test_a_complete_environment_is_used_as_it_is(bare):
    bare.add(*PINS, "torch==2.11.0", "pyarrow==18.0.0")  # older, but not too old
    result = setup("--python", RECIPE_PYTHON=bare.python)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{bare.python}\n", "")


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """The error, which is one line with exit code 2."""
    assert result.returncode == 2 and not result.stdout and result.stderr.count("\n") == 1, result
    return result.stderr


def test_an_environment_without_torch_is_refused(bare):
    error = one_line(setup("--python", RECIPE_PYTHON=bare.python))
    assert re.search(r"not installed: torch, .* and \d+ more", error)
    assert f"{bare.python} -m pip install -r {ROOT}/requirements.txt" in error


def test_no_stage_starts_in_an_environment_that_lacks_packages(make_project, bare):
    project = make_project()
    project.environment["RECIPE_PYTHON"] = str(bare.python)
    for script in ("run_all.sh", "pretrain/05_pretrain.sh", "fine-tuning/12_finetune.sh"):
        assert "not installed: torch" in one_line(project.run(script, check=False))


def test_missing_packages_are_named_with_the_command_that_installs_them(bare):
    bare.add(*(pin for pin in PINS if not pin.startswith(("trl==", "datatrove=="))))
    error = one_line(setup("--python", RECIPE_PYTHON=bare.python))
    assert "not installed: trl, datatrove. Install:" in error
    names = [pin.split("==")[0] for pin in error.split("pip install ")[1].split()]
    assert names == ["trl", "datatrove"]  # and nothing else, torch above all


def test_what_few_scripts_import_may_be_missing(bare):
    """As on a GPU image without a network: trainings and tests run, the page of chat.py does not."""
    bare.add(*(pin for pin in PINS if not pin.startswith(("gradio==", "httpx2==", "starlette=="))))
    assert setup("--python", RECIPE_PYTHON=bare.python).returncode == 0
    error = one_line(setup("--extra", "tests", RECIPE_PYTHON=bare.python))
    assert "not installed: pytest, pytest-timeout, pytest-xdist. Install" in error


def test_the_page_of_the_chat_names_what_it_lacks(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("chat", ROOT / "fine-tuning/chat.py")
    chat = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chat)
    monkeypatch.setattr(chat, "is_installed", lambda name: name != "gradio")
    monkeypatch.setattr("sys.argv", ["chat.py", "--web"])
    with pytest.raises(SystemExit) as ended:
        chat.main()
    assert ended.value.code == 2
    assert "--web: not installed: gradio. Install: " in capsys.readouterr().err


def test_another_major_version_is_refused(bare):
    bare.add(*PINS, "torch==1.13.1", "datasets==2.21.0")
    error = one_line(setup("--python", RECIPE_PYTHON=bare.python))
    assert "torch is 1.13.1, expected 2.*; datasets is 2.21.0, expected 5.*. Install: " in error


def test_a_python_that_does_not_exist_or_is_too_old_is_refused(tmp_path):
    assert "RECIPE_PYTHON=python9: not found" in one_line(setup("--python", RECIPE_PYTHON="python9"))
    old = executable(tmp_path / "old", 'case "$1" in --version) echo Python 3.9.2 ;; *) exit 1 ;; esac\n')
    assert "Python 3.9.2, expected Python 3.11 or newer" in one_line(setup(RECIPE_PYTHON=old))


def test_extras_are_checked_but_not_installed(bare):
    bare.add(*PINS)
    error = one_line(setup("--extra", "ray", "megatron", "--python", RECIPE_PYTHON=bare.python))
    assert f"not installed: ray, megatron-core. Install: {bare.python} -m pip install ray==" in error
    bare.add(*EXTRAS["ray"])
    assert setup("--extra", "ray", RECIPE_PYTHON=bare.python).returncode == 0


def test_the_scripts_find_the_code_next_to_them(make_project):
    project = make_project()
    (project.folder / "pretrain/recipe/run/check.py").write_text("print('the code of this folder')\n")
    (project.folder / "pretrain/recipe/run/launch.py").write_text("print('its launcher')\n")
    del project.environment["PYTHONPATH"]
    assert project.run("run_all.sh", "--dry-run", "--to", "0", check=False).stdout.startswith("the code of")
    for script in ("pretrain/05_pretrain.sh", "fine-tuning/12_finetune.sh", "fine-tuning/13_preference.sh"):
        assert project.run(script).stdout == "its launcher\n"


def test_a_copy_of_the_project_does_not_depend_on_the_gpu(make_project, tmp_path):
    project = make_project()
    project.environment["PATH"] = f"{gpu(tmp_path, '9.0')}:{os.environ['PATH']}"
    assert project.run("setup.sh", "--python", timeout=10).stdout == f"{sys.executable}\n"


# ---------------------------------------------------------------------------------------------------------
# .venv


class Installer:
    """An environment whose pip writes down what it is asked to install, and installs nothing.

    has_wheel: whether pip finds a ready wheel of flash-attn.
    """

    def __init__(self, folder: Path, has_wheel: bool = True) -> None:
        self.log = folder / "log"
        bare = Environment(folder / "bare").python
        flash = folder / "flash_attn"  # is there while it is installed
        wheel = "touch" if has_wheel else "false"
        executable(
            folder / "venv/bin/python",
            f"""case "$*" in
              *"pip --version" | -) ;;
              *"uninstall"*torch) echo torch >>{folder}/uninstalled ;;
              *uninstall*) rm -f {flash} ;;
              *"pip show torch"*) cat {folder}/installed ;;
              *"--index-url http://nobody/"*) exit 1 ;;
              *"--only-binary flash-attn"*) echo "$@" >>{self.log}; {wheel} {flash} ;;
              *"--no-binary flash-attn"*) echo "$@" >>{self.log}; touch {flash} ;;
              *" install "*) echo "$@" >>{self.log} ;;
              *flash_attn) test -e {flash} ;;
              *sysconfig*) echo {folder} ;;
              *) exec {bare} "$@" ;;
            esac\n""",
        )
        tools = executable(folder / "tools/g++", "").parent
        executable(tools / "nvcc", "")
        self.environment = {"VENV": folder / "venv", "PYTHON": sys.executable, "PATH": tools}

    def holds(self, pin: str) -> None:
        """Let `pip show` show a package."""
        name, version = pin.split("==")
        shown = f"Name: {name}\nVersion: {version}\n" + "Summary: more\n" * 5000
        (self.log.parent / "installed").write_text(shown)

    def uninstalled(self) -> list[str]:
        """The packages that were uninstalled so far."""
        return (self.log.parent / "uninstalled").read_text().split()

    def run(self, *arguments: str, gpu: Path | str = "", **environment: str) -> tuple[list[str], str]:
        """Run setup.sh. Returns the calls of `pip install` and what setup.sh said."""
        self.log.write_text("")
        path = f"{gpu}:{self.environment['PATH']}:{os.environ['PATH']}"
        result = setup(*arguments, **self.environment | environment | {"PATH": path})
        assert result.returncode == 0, result.stderr
        return self.log.read_text().splitlines(), result.stderr


def test_set_up_installs_once_and_again_when_a_gpu_appears(tmp_path):
    installer = Installer(tmp_path)
    without = gpu(tmp_path / "none", "")  # a GPU of this machine is not seen
    calls, said = installer.run(gpu=without, TORCH_CPU_INDEX="")
    assert len(calls) == 1 and f"-r {ROOT}/requirements.txt" in calls[0] and EXTRAS["tests"][0] in calls[0]
    assert "flash-attn: not installed, no NVIDIA GPU" in said
    assert (tmp_path / "recipe.pth").read_text() == f"{ROOT}/pretrain\n"
    assert installer.run(gpu=without) == ([], "")
    assert len(installer.run(gpu=gpu(tmp_path / "gpu", "9.0"))[0]) == 2


def test_an_environment_of_another_python_is_made_again(tmp_path):
    installer = Installer(tmp_path)
    python, fresh = tmp_path / "venv/bin/python", tmp_path / "fresh"
    shutil.copy(python, fresh)
    base = (
        f"""case "$*" in "-m venv --clear"*) cp {fresh} {python} ;; *) exec {sys.executable} "$@" ;; esac\n"""
    )
    asked = str(executable(tmp_path / "base", base))
    assert installer.run(PYTHON=asked)[0] and not installer.run(PYTHON=asked)[0]
    # After an upgrade of the system, the environment's Python is another one.
    python.write_text(fresh.read_text().replace("case", 'case "$*" in -V) echo 3.99; exit ;; esac\ncase', 1))
    assert installer.run(PYTHON=asked)[0]
    assert python.read_text() == fresh.read_text()


def test_torch_is_the_cpu_build_without_a_gpu_and_replaced_when_one_appears(tmp_path):
    installer, torch = Installer(tmp_path), next(pin for pin in PINS if pin.startswith("torch=="))
    without, present = gpu(tmp_path / "none", ""), gpu(tmp_path / "gpu", "9.0")
    calls, said = installer.run(gpu=without)
    assert len(calls) == 2 and f"-r {ROOT}/requirements.txt" in calls[1]
    assert re.search(rf"--index-url https://\S+/cpu .*--no-deps {torch}$", calls[0])
    installer.holds(f"{torch}+cpu")
    assert not any("--index-url" in call for call in installer.run(gpu=present)[0])
    assert installer.uninstalled() == ["torch"]
    installer.holds(torch)
    (tmp_path / "venv/.recipe-ready").unlink()
    installer.run(gpu=present)
    assert installer.uninstalled() == ["torch"]  # not once more


def test_an_image_gets_the_cuda_build_although_none_sees_a_gpu_while_it_is_built():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert "ARG TORCH_CPU_INDEX=" in lines
    assert any("TORCH_CPU_INDEX=$TORCH_CPU_INDEX VENV=/opt/venv bash setup.sh" in line for line in lines)


def test_an_index_that_does_not_answer_does_not_end_the_set_up(tmp_path):
    installer = Installer(tmp_path)
    calls, said = installer.run(gpu=gpu(tmp_path / "none", ""), TORCH_CPU_INDEX="http://nobody/")
    assert len(calls) == 1 and "http://nobody/: no answer, so torch comes with its CUDA" in said


@pytest.mark.parametrize("name", ["a folder", "o'hara", 'a"b'])
def test_a_path_that_torch_compile_cannot_use_is_refused(tmp_path, name):
    for folder in (tmp_path / name, tmp_path / "日本語"):
        folder.mkdir()
        shutil.copy(ROOT / "setup.sh", folder)
    environment = {k: v for k, v in os.environ.items() if k != "RECIPE_PYTHON"} | {"PYTHON": "python9"}
    command = ["bash", "setup.sh"]
    results = [
        subprocess.run(command, cwd=tmp_path / place, env=environment, capture_output=True, text=True)
        for place in (name, "日本語")
    ]
    assert results[0].returncode == 2 and f"a space or a quote: {tmp_path}/{name}. Move" in results[0].stderr
    assert "python9: not found" in results[1].stderr


@pytest.mark.parametrize(
    ("capability", "has_wheel", "option", "said", "compiles"),
    [
        ("9.0", True, "", "installed from a ready wheel, for compute capability 9.0", False),
        ("9.0", False, "", "not installed, no ready wheel fits (FLASH_ATTN=build compiles it)", False),
        ("12.0", False, "build", "compiled for compute capability 12.0", True),
        ("7.5", True, "build", "not installed, it needs compute capability 8.0 and this GPU has 7.5", False),
    ],
)
def test_flash_attention_is_compiled_only_on_request(tmp_path, capability, has_wheel, option, said, compiles):
    installer = Installer(tmp_path, has_wheel)
    calls, text = installer.run(gpu=gpu(tmp_path / "gpu", capability), FLASH_ATTN=option)
    assert f"flash-attn: {said}" in text
    assert any("--no-binary flash-attn" in call for call in calls) == compiles


def test_flash_attention_is_compiled_later_and_then_kept(tmp_path):
    installer, path = Installer(tmp_path, has_wheel=False), gpu(tmp_path / "gpu", "9.0")
    installer.run(gpu=path)
    assert installer.run(gpu=path) == ([], "")  # not searched for again
    calls, said = installer.run(gpu=path, FLASH_ATTN="build")
    assert "--no-binary flash-attn" in calls[-1] and said.endswith("compiled for compute capability 9.0\n")
    assert installer.run(gpu=path, FLASH_ATTN="build") == installer.run(gpu=path) == ([], "")


def test_extras_are_installed_by_name_at_the_pinned_version(tmp_path):
    installer = Installer(tmp_path)
    installer.run()
    calls, said = installer.run("--extra", "ray", "sudachi")
    assert len(calls) == 1 and calls[0].endswith(" ".join(EXTRAS["ray"] + EXTRAS["sudachi"]))
    assert said == "setup: installs: ray sudachi\n"
    result = setup("--extra", "rya", **installer.environment | {"PATH": os.environ["PATH"]})
    assert result.returncode == 2 and "unknown extra 'rya'. Known: tests, lint, ray, sudachi" in result.stderr
    assert setup("--extra").returncode == setup("--pyhton").returncode == 2


# ---------------------------------------------------------------------------------------------------------
# Extras that a recipe needs


@pytest.mark.parametrize(
    ("extra", "command", "where"),
    [
        ("ray", "run_all.sh --dry-run --set dataset.engine.executor=ray", "dataset.json: engine: executor: "),
        ("sudachi", "run_all.sh --recipe gpt2-xl --set tokenizer.segmenter=sudachi", "tokenizer.json: segm"),
        ("gguf", "fine-tuning/to_gguf.py", "to_gguf: "),
    ],
)
def test_an_extra_that_is_missing_is_refused_before_anything_starts(make_project, extra, command, where):
    project = make_project()
    pins = project.folder / "pyproject.toml"
    pins.write_text(pins.read_text().replace(f"{extra} = [", f'{extra} = ["no-such-package==1.0", '))
    result = project.run(*command.split(), check=False)
    assert result.returncode == 2 and not (project.folder / "outputs").exists()
    assert where in result.stderr and result.stderr.count("\n") == 1
    assert "not installed: no-such-package" in result.stderr
    assert f"Run `bash setup.sh --extra {extra}`" in result.stderr


# ---------------------------------------------------------------------------------------------------------
# Pins

# Modules whose package has another name.
NAMES = {
    "google": "protobuf",
    "markdown_it": "markdown-it-py",
    "megatron": "megatron-core",
    "pynvml": "nvidia-ml-py",
    "yaml": "PyYAML",
}


def imported(path: Path) -> set[str]:
    """The top-level modules that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {
        name.split(".")[0]
        for name in plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    }


def test_every_import_is_pinned():
    pins = [*PINS, *(pin for extra in EXTRAS.values() for pin in extra)]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), pins
    pinned = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    files = [path for folder in ("pretrain", "fine-tuning") for path in (ROOT / folder).rglob("*.py")]
    modules = set().union(*map(imported, files)) - set(sys.stdlib_module_names) - {"recipe", "run_grpo", ""}
    assert len(files) > 50 and "torch" in modules
    assert {NAMES.get(name, name).lower().replace("_", "-") for name in modules} <= pinned


@pytest.mark.parametrize("script", ["setup.sh", "tests/run.sh", "run_all.sh"])
def test_help_shows_the_usage_and_does_nothing_else(script):
    shown = subprocess.run(
        ["bash", script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True
    )
    assert f"Usage: bash {script}" in shown.stdout
    assert shown.stderr == "" and "set -euo" not in shown.stdout
