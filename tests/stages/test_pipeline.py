"""The whole pipeline on a small recipe, as a user runs it, and its outputs."""

import json
import re
import shutil
import subprocess
import sys

import pytest

STAGES = (
    "01_download",
    "02_dataset",
    "03_tokenizer",
    "04_tokenize",
    "05_pretrain",
    "06_evaluate",
    "07_generate",
    "11_dataset",
    "12_finetune",
    "14_evaluate",
    "15_generate",
    "16_export",
)


def test_every_stage_leaves_a_record(project):
    for stage in STAGES:
        record = json.loads(project.output("mini", stage).read_text())
        assert record["stage"] == stage
        assert record["seconds"] >= 0 and record["peak_memory_bytes"] > 1e7 and record["headline"]
    assert not list(project.folder.glob("outputs/mini/.*.work"))


def test_log_has_whole_lines(project):
    """Our bars and those of lm-evaluation-harness, datasets and transformers, in every stage."""
    assert "\r" not in project.first_run.stdout + project.first_run.stderr


def test_the_funnel_sums_up(project):
    funnel = json.loads(project.output("mini", "02_dataset", "funnel.json").read_text())
    for source in funnel["sources"].values():
        documents, size = source["documents"], source["bytes"]
        assert documents["in"] == documents["out"] + sum(documents["dropped"].values())
        assert size["in"] == size["out"] + sum(size["dropped"].values()) + size["trimmed"]
    assert funnel["sources"]["text"]["documents"]["in"] == 1200


def test_shards_hold_what_the_contract_says(project):
    import pyarrow.parquet as pq

    folder = project.output("mini", "02_dataset", ".")
    train, valid = (pq.read_table(folder / f"{side}-text-00000.parquet") for side in ("train", "valid"))
    assert train.column_names == ["id", "source", "text"]
    ids = set(train["id"].to_pylist()), set(valid["id"].to_pylist())
    assert not ids[0] & ids[1]
    assert 0.05 < len(ids[1]) / len(ids[0] | ids[1]) < 0.15
    assert (
        not (folder / "train-other-00000.parquet").exists()
        and (folder / "valid-other-00000.parquet").exists()
    )


def test_token_files_hold_every_document(project):
    figures = project.figures("mini", "04_tokenize")
    dataset = project.figures("mini", "02_dataset")["text"]["documents"]["out"]
    assert figures["totals"]["train"]["documents"] + figures["totals"]["valid"]["documents"] == dataset
    assert "other" not in figures["sources"]["valid"]


def test_active_settings_are_recorded(project):
    active = project.figures("mini", "05_pretrain")["active"]
    assert (
        active["precision"] == "fp32" and active["compiled"] is False and active["optimizer"] == "MuonAdamW"
    )
    assert active["global_batch"] == 8 and active["micro_batch"] == 4 and active["accumulation"] == 2
    assert project.figures("mini", "12_finetune")["active"]["optimizer"] == "AdamW"


def test_the_model_learns(project):
    losses = project.losses("mini")
    assert len(losses) == 20 and losses[-1] < losses[0] - 1
    assert [row["step"] for row in project.log("mini") if "eval_loss" in row] == [10, 20]
    after = project.figures("mini", "14_evaluate")
    assert after["after"]["response_loss"] < after["before"]["response_loss"]


def test_evaluation_separates_the_domains(project):
    metrics = json.loads(project.output("mini", "06_evaluate", "metrics.json").read_text())
    assert metrics["out_of_domain"]["documents"] == metrics["sources"]["other"]["documents"]
    assert metrics["in_domain"]["documents"] == metrics["sources"]["text"]["documents"]
    valid_loss = project.figures("mini", "05_pretrain")["eval_loss"]
    assert metrics["in_domain"]["loss"] == pytest.approx(valid_loss, rel=1e-3)


@pytest.mark.parametrize("stage", ["05_pretrain", "12_finetune"])
def test_learning_curve_is_a_picture_and_a_table(project, stage):
    picture = project.output("mini", stage, "learning_curve.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    head, _, *rows = project.output("mini", stage, "metrics.md").read_text().splitlines()[2:]
    assert head == "| step | train loss | valid loss | train perplexity | valid perplexity |"
    evaluations = [row for row in project.log("mini", stage) if "eval_loss" in row]
    assert len(rows) == len({row["step"] for row in evaluations})
    assert f"| {evaluations[-1]['eval_loss']:.4f} |" in rows[-1]


def test_samples_are_side_by_side(project):
    (row,) = json.loads(project.output("mini", "07_generate", "samples.json").read_text())
    assert set(row) == {"prompt", "before", "after"}
    answers = json.loads(project.output("mini", "15_generate", "answers.json").read_text())
    assert answers[0]["prompt"] == "山は高いですか?" and {"before", "after", "reference"} <= set(answers[0])
    shown = project.output("mini", "15_generate", "answers.md").read_text("utf-8")
    assert shown.startswith("| prompt | reference | before | after |")


def test_the_model_is_plain_hugging_face(project, tmp_path):
    """It loads in a process that cannot import our code, with its chat template."""
    model = tmp_path / "model"
    shutil.copytree(
        project.output("mini", "12_finetune", "."), model, ignore=shutil.ignore_patterns("checkpoints")
    )
    code = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
sys.path[:] = [path for path in sys.path if not path.endswith("pretrain")]
try:
    import recipe
except ImportError:
    pass
else:
    raise SystemExit("recipe can be imported: this proves nothing")
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(model)!r})
model = AutoModelForCausalLM.from_pretrained({str(model)!r})
messages = [{{"role": "user", "content": "山は?"}}]
ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
assert ids["input_ids"][0, 0] == tokenizer.bos_token_id == model.config.bos_token_id == 2
assert (ids["input_ids"] == 2).sum() == 1
assert model.config.eos_token_id == tokenizer.eos_token_id == 3
assert model.config.vocab_size == len(tokenizer)
assert model.config.use_cache
text = "明治天皇は大嘗宮を主宰した。"
assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
print(model.generate(**ids, max_new_tokens=3).shape)
"""
    result = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not list(model.glob("*.bin")) and not list(model.glob("*.py"))


def test_second_run_skips_everything(project):
    result = project.run("run_all.sh", "--recipe", "mini")
    assert result.stdout.count("done before") == len(STAGES)
    assert "total" in result.stdout and "learning_curve.png" in result.stdout


def test_changed_config_is_stale_with_its_keys(project):
    result = project.run(
        "run_all.sh", "--recipe", "mini", "--set", "pretrain.learning_rate=1e-3", check=False
    )
    assert result.returncode == 2
    assert "config.pretrain.learning_rate: 0.01 -> 0.001" in result.stderr
    assert "--force" in result.stderr and "cp -r configs/mini" in result.stderr
    assert "06_evaluate" not in result.stdout


def test_logging_keys_make_nothing_stale(project):
    result = project.run("run_all.sh", "--recipe", "mini", "--set", "pretrain.logging_steps=7")
    assert result.stdout.count("done before") == len(STAGES)


def test_dry_run_says_what_would_be_done(project):
    command = ("run_all.sh", "--recipe", "mini", "--dry-run")
    assert project.run(*command).returncode == 0
    result = project.run(*command, "--set", "generation.seed=9", check=False)
    assert "07_generate: error: stale" in result.stderr and "05_pretrain     done before" in result.stdout
    assert "12_finetune     done before" in result.stdout  # a stage after the stale one
    assert result.returncode == 2
    tokenizer = ("--set", "tokenizer.vocab_size=390", "--from", "03", "--to", "04", "--force")
    forced = project.run(*command, *tokenizer).stdout
    assert "04_tokenize     would start over (--force) after 03_tokenizer, which is stale" in forced
    later = project.run(*command, *tokenizer[:2], "--from", "05", "--force", check=False)
    assert later.returncode == 2 and "05_pretrain: error: its input 03_tokenizer is stale" in later.stderr


def test_copied_recipe_takes_finished_stages(project):
    project.copy("copy")
    project.edit("copy", "pretrain", max_steps=3)
    output = project.run("run_all.sh", "--recipe", "copy", "--to", "04").stdout
    for stage in STAGES[:4]:
        # From whichever recipe of these tests has the same result.
        assert re.search(rf"taken from outputs/[\w-]+/{stage}", output)
        assert project.output("copy", stage).read_bytes() == project.output("mini", stage).read_bytes()
    result = project.run("pretrain/05_pretrain.sh", "--recipe", "copy")
    assert "3 steps" in result.stdout and "\r" not in result.stderr
    assert project.figures("copy", "05_pretrain")["steps"] == 3
    assert project.figures("mini", "05_pretrain")["steps"] == 20


def test_a_recipe_rewritten_with_extends_is_not_stale(project):
    """The same finished stages under a recipe whose files only extend mini; then one stage done again."""
    (project.folder / "configs/extending").mkdir()
    for file in (project.folder / "configs/mini").glob("*.json"):
        (project.folder / "configs/extending" / file.name).write_text('{"extends": "mini"}')
    shutil.copytree(project.folder / "outputs/mini", project.folder / "outputs/extending")
    lines = project.run("run_all.sh", "--recipe", "extending", "--dry-run").stdout.splitlines()
    assert [line.split()[0] for line in lines if "done before" in line] == list(STAGES)
    project.run("pretrain/01_download.py", "--recipe", "extending", "--force")
    again = json.loads(project.output("extending", "01_download").read_text())
    first = json.loads(project.output("mini", "01_download").read_text())
    assert again["recipe"] == "extending" and again["config"] == first["config"]


def test_list_names_every_stage(project):
    lines = project.run("run_all.sh", "--list").stdout.splitlines()
    names = [line.split()[0].split("/")[1].split(".")[0] for line in lines]
    assert names == sorted([*STAGES, "13_preference"])
    assert all(len(line.split()) > 3 for line in lines)


def test_stale_input_is_noticed_by_a_later_stage(project):
    change = ("--set", "tokenizer.seed=9")
    result = project.run("run_all.sh", "--recipe", "mini", "--from", "05", *change, check=False)
    assert result.returncode == 2
    assert "its input 03_tokenizer is stale: tokenizer.seed: absent -> 9" in result.stderr
    assert "had options --set, give the same ones again" in result.stderr
    assert "--set tokenizer.seed=9 --from 03 --force" in result.stderr


def test_recipe_without_pairs_is_not_tuned(project):
    project.copy("plain")
    project.edit("plain", "instruction", pairs={})
    result = project.run("run_all.sh", "--recipe", "plain")
    assert result.stdout.count("skipped: instruction.json names no pairs") == 4
    assert "Talk to the model" not in result.stdout
