"""Stages 06 and 14 with tasks: what they write, and when they are done again."""

import json
import shutil

import pytest
from recipe.config.tasks import SUITES


def cache_belebele(folder):
    """Put questions of Belebele's form where datasets would have put the real ones."""
    import datasets

    answers = {f"mc_answer{i}": answer for i, answer in enumerate(("山", "海", "川", "空"), 1)}
    rows = [
        {"flores_passage": "山は高い。", "question": "何が高い?", "correct_answer_num": str(i)} | answers
        for i in (1, 2, 3, 4)
    ]
    made = folder / "made"
    made.mkdir()
    (made / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    files = {"test": str(made / "rows.jsonl")}
    datasets.load_dataset("json", data_files=files, cache_dir=str(made / "cache"))
    (arrow,) = made.rglob("json-test.arrow")
    target = folder / "cache/facebook___belebele/jpn_Jpan/0.0.0/1"
    target.mkdir(parents=True)
    shutil.copy(arrow, target / "belebele-test.arrow")
    info = json.loads((arrow.parent / "dataset_info.json").read_text())
    info |= {"dataset_name": "belebele", "config_name": "jpn_Jpan"}
    (target / "dataset_info.json").write_text(json.dumps(info))


@pytest.fixture(scope="module")
def asked(project):
    """The recipe `asked`: mini with JNLI and JSQuAD from files in their own form, and a cached Belebele.

    Its environment is offline; the other tests of the shared project get theirs back.
    """
    project.copy("asked")
    rows = [
        {"sentence1": f"{i}回見ました。", "sentence2": f"{i}回です。", "label": label}
        for i in range(4)
        for label in ("entailment", "contradiction", "neutral")
    ]
    question = {"question": "何をしましたか?", "answers": [{"text": "山に登りました", "answer_start": 9}]}
    paragraph = {"context": "夏 [SEP] 夏休みに山に登りました。", "qas": [question] * 3}
    squad = {"data": [{"title": "夏", "paragraphs": [paragraph]}]}
    for side in ("train", "valid"):
        for name in ("jnli", "jsquad"):
            (project.folder / name).mkdir(exist_ok=True)
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (project.folder / f"jnli/{side}-v1.3.json").write_text(text, "utf-8")
        (project.folder / f"jsquad/{side}-v1.3.json").write_text(json.dumps(squad), "utf-8")
    cache_belebele(project.folder)
    before = project.environment
    project.environment = before | {
        "HF_DATASETS_CACHE": str(project.folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    tasks = {"jnli": {"path": "jnli"}, "jsquad": {"path": "jsquad"}, "belebele_jpn_Jpan": {}}
    suite = {"suite": "japanese", "skip_unavailable": True}
    project.edit("asked", "evaluation", tasks=tasks, items_per_task=9, **suite)
    project.run("run_all.sh", "--recipe", "asked", "--to", "14", timeout=600)
    yield project
    project.environment = before


def test_tasks_are_scored_beside_guessing(asked):
    metrics = json.loads(asked.output("asked", "06_evaluate", "metrics.json").read_text())
    jnli = metrics["tasks"]["jnli"]
    assert jnli["items"] == 9 and jnli["low"] < jnli["score"] < jnli["high"] and jnli["majority"] >= 1 / 3
    assert metrics["tasks"]["jsquad"]["items"] == 3
    assert metrics["tasks"]["belebele_jpn_Jpan"]["items"] == 4
    text = asked.output("asked", "06_evaluate", "metrics.md").read_text()
    assert "| jnli | acc | 9 |" in text and "blocks of 64 tokens without overlap" in text
    assert len(asked.output("asked", "06_evaluate", "tasks/jnli.test.jsonl").read_text().splitlines()) == 9
    assert not asked.output("asked", "06_evaluate", "tasks/.cache").exists()


def test_tasks_of_a_suite_without_their_data_are_listed_with_the_reason(asked):
    suite = set(SUITES["japanese"])
    for stage in ("06_evaluate", "14_evaluate"):
        metrics = json.loads(asked.output("asked", stage, "metrics.json").read_text())
        assert metrics["skipped_tasks"].keys() == suite
        text = asked.output("asked", stage, "metrics.md").read_text()
        assert "Not asked (skip_unavailable):" in text and "Rakuten/JGLUE (JNLI), are not in" in text
        assert all(f"- {name}: " in text for name in suite)
    # What a finished stage has skipped is still to be asked.
    refuse = ("--set", "evaluation.skip_unavailable=false")
    result = asked.run("run_all.sh", "--recipe", "asked", "--dry-run", *refuse, check=False)
    assert result.returncode == 2 and "tasks.copa-ja: its file https://" in result.stderr


def test_before_and_after_stand_in_one_table(asked):
    metrics = json.loads(asked.output("asked", "14_evaluate", "metrics.json").read_text())
    for name in ("before", "after"):
        assert {"jnli", "jsquad", "belebele_jpn_Jpan", "held-out mine"} == set(metrics[name]["tasks"])
        assert 0 <= metrics[name]["stop_rate"] <= 1 and 0 < metrics[name]["distinct_2"] <= 1
    lines = asked.output("asked", "14_evaluate", "metrics.md").read_text().splitlines()
    assert lines[0] == "| held-out instructions | before | after |"
    (row,) = [line for line in lines if line.startswith("| response loss ")]
    before, after = (float(cell) for cell in row.split("|")[2:4])
    assert after < before
    assert any(line.startswith("| held-out mine | acc_mutual_info | ") for line in lines)


def test_a_task_without_its_data_is_refused_before_the_first_stage(asked):
    tasks = 'evaluation.tasks={"ja_leaderboard_jnli": {}}'
    result = asked.run("run_all.sh", "--recipe", "mini", "--dry-run", "--set", tasks, check=False)
    assert result.returncode == 2
    assert "tasks.ja_leaderboard_jnli: its data, Rakuten/JGLUE (JNLI), are not in" in result.stderr


def test_a_changed_task_file_makes_both_stages_stale(asked):
    path = asked.folder / "jnli/valid-v1.3.json"
    path.write_text(path.read_text("utf-8") + "\n", "utf-8")
    result = asked.run("run_all.sh", "--recipe", "asked", "--dry-run", check=False)
    stale = "error: stale: made from other settings or inputs. Changed: facts.jnli"
    assert f"06_evaluate: {stale}" in result.stderr and f"14_evaluate: {stale}" in result.stderr


def test_the_report_shows_the_tasks(asked):
    asked.run("pretrain/recipe/export/html_report.py", "--recipe", "asked")
    page = (asked.folder / "outputs/asked/report.html").read_text("utf-8")
    assert "<td>jsquad</td>" in page and "held-out mine" in page
