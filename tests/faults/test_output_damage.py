"""A finished output that is damaged is never read: the next stage names the file and what to do."""

import json
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

MODEL = "model.safetensors"


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero_half(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def delete(path):
    path.unlink()


def add(path):
    path.write_bytes(b"another file")


def drop_tensor(path):
    weights = load_file(path)
    weights.pop(min(weights))
    save_file(weights, path, {"format": "pt"})


def swap_tokens(path):
    """Swap two tokens of a unigram's vocabulary, whose entries are [token, score]; the size stays."""
    lines = path.read_text("utf-8").split("\n")
    at = [number for number, line in enumerate(lines) if re.fullmatch(r'\s+"[^"]+",', line)]
    lines[at[300]], lines[at[301]] = lines[at[301]], lines[at[300]]
    path.write_text("\n".join(lines), "utf-8")
    assert len(json.loads("\n".join(lines))["model"]["vocab"]) == 400


def change_layers(path):
    path.write_text(path.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))


# (stage, file, damage, the stage that reads it). The output of a stage is damaged, then the other one starts.
DAMAGES = [
    *(("02_dataset", "train-text-00000.parquet", kind, "04") for kind in (flip, zero_half, truncate, delete)),
    *(("02_dataset", "valid-text-00000.parquet", kind, "06") for kind in (flip, zero_half, delete)),
    ("02_dataset", "train-text-00009.parquet", add, "03"),
    ("02_dataset", "valid-text-00000.parquet", flip, "11"),
    *(("03_tokenizer", "tokenizer.json", kind, "04") for kind in (swap_tokens, flip, truncate, delete)),
    ("03_tokenizer", "tokenizer_config.json", delete, "05"),
    *(("04_tokenize", "train.bin", kind, "05") for kind in (flip, zero_half, truncate, delete)),
    *(("04_tokenize", file, flip, "05") for file in ("train.idx", "valid.bin", "valid.idx")),
    *(("05_pretrain", MODEL, kind, "06") for kind in (flip, zero_half, truncate, drop_tensor, delete)),
    ("05_pretrain", MODEL, drop_tensor, "12"),
    ("05_pretrain", "config.json", change_layers, "07"),
    ("05_pretrain", "tokenizer.json", swap_tokens, "12"),
    ("05_pretrain", "another.safetensors", add, "07"),
    *(("11_dataset", "train.parquet", kind, "12") for kind in (flip, zero_half, truncate)),
    ("11_dataset", "valid.parquet", flip, "14"),
    *(("12_finetune", MODEL, kind, "14") for kind in (flip, zero_half, drop_tensor)),
    ("12_finetune", "tokenizer.json", swap_tokens, "15"),
    ("12_finetune", MODEL, flip, "16"),
]


def names(entry):
    stage, file, kind, reader = entry
    return f"{stage}-{file}-{kind.__name__}-{reader}"


@pytest.mark.faults
@pytest.mark.parametrize("entry", DAMAGES, ids=names)
def test_a_damaged_output_stops_the_stage_that_reads_it(project, entry, fault_row):
    stage, file, kind, reader = entry
    fault_row("a finished output is damaged", 1, 0)
    path = project.output("mini", stage, file)
    content = path.read_bytes() if path.exists() else None
    (script,) = project.folder.glob(f"*/{reader}_*")
    line = (str(script.relative_to(project.folder)), "--recipe", "mini", "--force")
    kept = project.output("mini", script.stem).read_bytes()
    try:
        kind(path)
        result = project.run(*line, check=False)
    finally:
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
    assert result.returncode == 2, result.stdout
    assert f"{path}: " in result.stderr
    assert f"run_all.sh --recipe mini --from {stage[:2]} --force" in result.stderr
    assert project.output("mini", script.stem).read_bytes() == kept
    fault_row("a finished output is damaged", 0, 1)


@pytest.mark.faults
def test_a_damaged_stage_is_not_taken_over_by_another_recipe(project):
    project.copy("heir")
    project.run("run_all.sh", "--recipe", "heir", "--to", "02")
    path = project.output("mini", "03_tokenizer", "tokenizer.json")
    content = path.read_bytes()
    for kind, reason in ((truncate, "bytes, expected"), (swap_tokens, "damaged or changed")):
        try:
            kind(path)
            result = project.run("pretrain/03_tokenizer.py", "--recipe", "heir")
        finally:
            path.write_bytes(content)
        assert f"{path}: " in result.stderr and reason in result.stderr
        assert "so it is not taken over" in result.stderr and "done in" in result.stdout
        assert project.output("heir", "03_tokenizer", "tokenizer.json").read_bytes() == content
        shutil.rmtree(project.output("heir", "03_tokenizer", ""))
    assert "taken from" in project.run("pretrain/03_tokenizer.py", "--recipe", "heir").stdout


@pytest.mark.faults
def test_a_finished_stage_whose_files_are_gone_is_not_done(project):
    path = project.output("mini", "05_pretrain", "config.json")
    content = path.read_bytes()
    try:
        path.unlink()
        result = project.run("pretrain/05_pretrain.sh", "--recipe", "mini", check=False)
        chat = project.run("fine-tuning/chat.py", "--recipe", "mini", "--base", check=False)
    finally:
        path.write_bytes(content)
    for ended in (result, chat):
        assert ended.returncode == 2 and f"{path}: missing" in ended.stderr
