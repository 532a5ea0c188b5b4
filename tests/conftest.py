"""Copies of the project, each with a small recipe, so that tests never touch the outputs of a user."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from recipe.hardware import glance
from recipe.project import missing_packages

ROOT = Path(__file__).resolve().parents[1]

# A model small enough to build in a test.
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
# What some types of models need beyond SHAPE. Windows are shorter than a document, so that they matter, and
# long enough to reach the one before.
GEMMA3 = {"query_pre_attn_scalar": 16, "sliding_window": 6}
GEMMA3 |= {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
MINI = {
    "dataset": {
        "sources": {
            "text": {"source": "files", "paths": ["text/*.txt"]},
            "other": {"source": "files", "paths": ["other.jsonl"], "held_out": True},
        },
        "valid_share": 0.1,
        "engine": {"workers": 1},  # a process costs more than it saves here
    },
    "tokenizer": {"vocab_size": 400, "training_megabytes": 1},
    "model": {"model_type": "qwen3", "tie_word_embeddings": True} | SHAPE,
    "pretrain": {
        "block_size": 64,
        "global_batch_size": 8,
        "per_device_train_batch_size": 4,
        "max_steps": 20,
        "learning_rate": 1e-2,
        "muon_learning_rate": 2e-2,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 10,
        "save_steps": 5,
        "save_total_limit": 2,
        "bf16": False,
        "torch_compile": False,
    },
    "evaluation": {"batch_size": 4},
    "generation": {
        "prompts": ["今日は"],
        "questions": ["山は高いですか?"],
        "max_new_tokens": 8,
        "do_sample": True,
    },
    "instruction": {
        "template": "chat",
        "system": "あなたは親切です。",
        "pairs": {"mine": {"path": "pairs.json"}},
        "valid_share": 0.2,
    },
    "finetune": {
        "block_size": 128,
        "global_batch_size": 4,
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "bf16": False,
        "torch_compile": False,
    },
}


def skip_bf16_without_units(kind: str) -> None:
    """Skip a test of the precision bf16 where this machine cannot train in it."""
    if kind == "bf16" and not glance().fast_bf16:
        pytest.skip("could not run: this CPU has no fast bf16 units")


@pytest.fixture
def few_open_files():
    """This process may open ten more files: the limit that a large corpus reaches, which has more shards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    resource.setrlimit(resource.RLIMIT_NOFILE, (sorted({*range(len(used) + 11)} - used)[10], hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def sentences(count: int, seed: int) -> list[str]:
    """Different Japanese sentences, made from parts."""
    draw = random.Random(seed)
    who = ("私", "彼女", "先生", "猫", "学生", "母", "友だち", "父", "犬", "子ども")
    when = ("今日", "昨日", "去年", "毎朝", "夏休みに", "10〜20時に", "三時ごろ")
    what = (
        "本を読みました",
        "山に登りました",
        "湖を見ました",
        "料理を作りました",
        "Linuxを使いました",
        "歌を歌いました",
    )
    where = ("学校で", "家で", "公園で", "駅の前で", "図書館で", "海のそばで")
    return [
        f"{draw.choice(when)}、{draw.choice(who)}は{draw.choice(where)}{draw.randrange(100)}回{draw.choice(what)}。"
        for _ in range(count)
    ]


class Project:
    """A copy of the project; `run` starts one of its scripts as a user would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in (
            "pretrain",
            "fine-tuning",
            "configs",
            "run_all.sh",
            "setup.sh",
            "requirements.txt",
            "pyproject.toml",
        ):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(
                    source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
                )
            else:
                shutil.copy(source, folder / name)
        # The copy uses the environment that these tests run in, as it is, and its own code.
        self.environment = os.environ | {
            "RECIPE_PYTHON": sys.executable,
            "PYTHONPATH": str(folder / "pretrain"),
            "CUDA_VISIBLE_DEVICES": "",
        }

    def add_recipe(self, name: str, config: dict) -> None:
        """Write the files of a recipe."""
        (self.folder / "configs" / name).mkdir()
        for file, values in config.items():
            (self.folder / "configs" / name / f"{file}.json").write_text(
                json.dumps(values, ensure_ascii=False)
            )

    def copy(self, name: str) -> Path:
        """Add a recipe with the files of `mini`; the work folder of its pretraining."""
        shutil.copytree(self.folder / "configs/mini", self.folder / "configs" / name)
        return self.folder / f"outputs/{name}/.05_pretrain.work"

    def edit(self, recipe: str, file: str, **values: object) -> None:
        """Change keys of a recipe's file."""
        path = self.folder / "configs" / recipe / f"{file}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values, ensure_ascii=False))

    def run(
        self, *command: str, check: bool = True, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run ``stage.py …`` or ``script.sh …`` from another folder than the project's."""
        starter = "bash" if command[0].endswith(".sh") else sys.executable
        result = subprocess.run(
            [starter, str(self.folder / command[0]), *command[1:]],
            cwd=self.folder.parent,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and result.returncode:
            raise AssertionError(
                f"{command} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}"
            )
        return result

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a script and return at once."""
        starter = "bash" if command[0].endswith(".sh") else sys.executable
        return subprocess.Popen(
            [starter, str(self.folder / command[0]), *command[1:]],
            cwd=self.folder.parent,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=_heed_signals,
        )

    def output(self, recipe: str, stage: str, file: str = "stage.json") -> Path:
        """Path of a stage's output."""
        return self.folder / "outputs" / recipe / stage / file

    def digest(self, recipe: str, stage: str, file: str = "model.safetensors") -> str:
        """The sha256 of a stage's file. pytest's own comparison of 100 kB of bytes takes hours under CI."""
        with self.output(recipe, stage, file).open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    def figures(self, recipe: str, stage: str) -> dict:
        """The figures in a stage's record."""
        return json.loads(self.output(recipe, stage).read_text())["figures"]

    def log(self, recipe: str, stage: str = "05_pretrain") -> list[dict]:
        """The rows of a training's log: its steps and its evaluations."""
        lines = self.output(recipe, stage, "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def losses(self, recipe: str, stage: str = "05_pretrain") -> list[float]:
        """The training losses in a log."""
        return [row["loss"] for row in self.log(recipe, stage) if "loss" in row]


def wait_for(
    condition: Callable[[], object], process: subprocess.Popen[str] | None = None, seconds: float = 300
) -> None:
    """Wait until a condition is met; fail after so many seconds, or with what the process said at its end."""
    ends = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < ends, "the condition was not met in time"
        time.sleep(0.02)


def _heed_signals() -> None:
    """As in a terminal: a shell starts its background jobs, such as these tests, with SIGINT ignored."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked ``extra(NAME)`` where that extra of pyproject.toml is not installed."""
    for mark in item.iter_markers("extra"):
        if mark.args and (missing := missing_packages(mark.args[0])):
            names = ", ".join(missing)
            pytest.skip(f"could not run: not installed: {names} (bash setup.sh --extra {mark.args[0]})")


@pytest.fixture(scope="session")
def make_project(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Project]:
    """Make copies of the project, each with the recipe `mini` and its text."""

    def make() -> Project:
        project = Project(tmp_path_factory.mktemp("project"))
        project.add_recipe("mini", MINI)
        (project.folder / "text").mkdir()
        lines = sentences(6000, 1)
        documents = ["\n".join(lines[i : i + 5]) for i in range(0, len(lines), 5)]
        (project.folder / "text/a.txt").write_text("\n\n".join(documents), "utf-8")
        rows = [json.dumps({"text": text}, ensure_ascii=False) for text in sentences(200, 2)]
        (project.folder / "other.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
        pairs = [
            {"instruction": f"{i}番は何ですか?", "input": "", "output": text}
            for i, text in enumerate(sentences(60, 3))
        ]
        (project.folder / "pairs.json").write_text(json.dumps(pairs, ensure_ascii=False), "utf-8")
        return project

    return make


@pytest.fixture(scope="module")
def prepared(make_project: Callable[[], Project]) -> Project:
    """A project of this module's own, on which `mini` has run up to its pretraining."""
    project = make_project()
    project.run("run_all.sh", "--recipe", "mini", "--to", "04")
    return project


@pytest.fixture(scope="session")
def project(make_project: Callable[[], Project]) -> Project:
    """A project on which `mini` has run to the end, shared by tests that only look at it."""
    project = make_project()
    project.first_run = project.run("run_all.sh", "--recipe", "mini", timeout=600)
    return project
