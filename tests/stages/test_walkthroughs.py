"""The walk-throughs of pretrain/recipe/README.md, done as they are written, in one copy of the project."""

import json
import re

import pytest
from conftest import ROOT, sentences

README = ROOT / "pretrain/recipe/README.md"
STEP = re.compile(
    r"^\d+\. (?:\[[^\]]+\]\(|`)(?P<file>[\w/.-]+)[)`], (?P<where>[^:\n]+):[^`]*?\n\n"
    r"```\w+\n(?P<block>.*?)^```$",
    re.M | re.S,
)


def insert(text, where, block):
    """The text of a file with a block where a step says; the words are those of the README."""
    lines = text.splitlines(keepends=True)
    if where == "a new file":
        return block
    if where == "at the end":
        return f"{text}\n\n{block}"
    if where == "in the imports":
        last = max(i for i, line in enumerate(lines) if re.match(r"from recipe\b.* import [^(]*$", line))
        return "".join([*lines[: last + 1], block, *lines[last + 1 :]])
    kind, name = re.fullmatch(r"(in|above) `(\w+)`", where).groups()
    start = next(i for i, line in enumerate(lines) if re.match(rf"{name}\b.*=", line))
    end = start + next(i for i, line in enumerate(lines[start:]) if line == "}\n")
    place = end if kind == "in" else start
    return "".join([*lines[:place], block, *([] if kind == "in" else ["\n\n"]), *lines[place:]])


@pytest.fixture(scope="module")
def changed(make_project):
    """A project in which every step was done and a recipe that uses all of them has run to stage 06."""
    project = make_project()
    steps = [found.groupdict() for found in STEP.finditer(README.read_text("utf-8"))]
    for step in steps:
        path = project.folder / "pretrain/recipe" / step["file"]
        path.write_text(insert(path.read_text() if path.exists() else "", step["where"], step["block"]))
    project.steps = steps
    (project.folder / "srt").mkdir()
    for number in range(200):
        spoken = sentences(10, 100 + number)
        rows = [f"{i}\n00:00:{i:02} --> 00:00:{i + 1:02}\n{line}\n" for i, line in enumerate(spoken)]
        (project.folder / f"srt/{number}.srt").write_text("\n".join(rows), "utf-8")
    (project.folder / "my_tasks").mkdir()
    row = {"question": "朝は", "choices": ["おはよう", "こんばんは"], "answer": 0}
    (project.folder / "my_tasks/greetings.jsonl").write_text(
        json.dumps(row, ensure_ascii=False) + "\n", "utf-8"
    )
    project.edit("mini", "dataset", sources={"films": {"source": "subtitles", "paths": ["srt/*.srt"]}})
    project.edit("mini", "tokenizer", kind="bytes", vocab_size=260)
    project.edit(
        "mini", "pretrain", optim="lion", learning_rate=1e-3, muon_learning_rate=None, warmup_steps=4
    )
    project.edit("mini", "pretrain", lr_scheduler_type="cosine_warmup_with_min_lr")
    project.edit("mini", "pretrain", lr_scheduler_kwargs={"min_lr_rate": 0.1})
    project.edit("mini", "evaluation", tasks={"greetings": {}})
    project.run("run_all.sh", "--recipe", "mini", "--to", "06", timeout=600)
    return project


def test_every_walk_through_has_its_steps(changed):
    files = [step["file"] for step in changed.steps]
    assert len(files) == 11 and len(set(files)) == 8, files


def test_schedule(changed):
    active = changed.figures("mini", "05_pretrain")["active"]
    assert active["scheduler"] == "cosine_warmup_with_min_lr (LambdaLR)"
    assert active["learning_rates"]["4"] == pytest.approx(1e-3, rel=0.02)


def test_source(changed):
    counts = json.loads(changed.output("mini", "02_dataset", "funnel.json").read_text())["sources"]["films"]
    assert counts["documents"]["in"] == 200 and counts["bytes"]["out"] > 0


def test_tokenizer(changed):
    report = json.loads(changed.output("mini", "03_tokenizer", "report.json").read_text())
    assert report["check"]["lossless"] > 0
    assert changed.figures("mini", "03_tokenizer")["bytes_per_token"] == 1


def test_optimizer(changed):
    assert changed.figures("mini", "05_pretrain")["active"]["optimizer"] == "Lion"
    losses = changed.losses("mini")
    assert losses[-1] < losses[0] - 0.5


def test_task(changed):
    scored = changed.figures("mini", "06_evaluate")["tasks"]["greetings"]
    assert scored["items"] == 1 and scored["score"] in (0, 1)
