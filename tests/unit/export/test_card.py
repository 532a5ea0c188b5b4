"""The model card: its code runs, and its prompts become the ids that the model was trained on."""

import json
import re
from types import SimpleNamespace

import pytest
from conftest import SHAPE, sentences
from recipe.export.card import copy_model, model_card, push
from recipe.model.build import build_model
from recipe.project import RecipeError, write_json
from recipe.tokenization.encode_text import prompt_ids
from recipe.tokenization.train import train_tokenizer

PROMPT = '山の"上"は'
FIGURES = {
    "02_dataset": {"web": {"documents": {"in": 3, "out": 2, "dropped": {"short": 1}}, "bytes": {"out": 9}}},
    "03_tokenizer": {},
    "05_pretrain": {"active": {"parameters": 12_345}, "tokens": 678},
    "06_evaluate": {"in_domain": {"loss": 1.5}},
    "07_generate": {},
}


@pytest.fixture
def finished(tmp_path):
    """The folders of an untuned recipe's finished stages; that of stage 05 holds the model."""
    folders = {stage: tmp_path / stage for stage in FIGURES}
    for stage, folder in folders.items():
        folder.mkdir()
        record = {"figures": FIGURES[stage], "headline": stage, "finished": "2026-01-01", "commit": None}
        write_json(folder / "stage.json", record | {"versions": {}})
    (folders["06_evaluate"] / "metrics.md").write_text("loss 1.5")
    return folders


CONFIG = {
    "dataset": {"sources": {"web": {"source": "files", "licence": "CC0"}}},
    "tokenizer": {"kind": "unigram"},
    "model": {"model_type": "qwen3"},
    "pretrain": {"learning_rate": 0.5},
    "generation": {"prompts": [PROMPT], "max_new_tokens": 2},
}


def test_the_code_of_the_card_runs_and_starts_as_documents_do(finished, capsys):
    folder = finished["05_pretrain"]
    tokenizer = train_tokenizer(sentences(2000, 1), {"vocab_size": 400}).tokenizer
    tokenizer.save_pretrained(folder)
    build_model({"model_type": "qwen3", **SHAPE}, tokenizer, "sdpa", 0).save_pretrained(folder)
    card = model_card("mine", str(folder), CONFIG, finished)
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)
    assert names["inputs"]["input_ids"][0].tolist() == prompt_ids(tokenizer, PROMPT)
    assert names["inputs"]["input_ids"][0, 0] == tokenizer.bos_token_id
    assert "上" in capsys.readouterr().out


def test_the_card_tells_what_was_measured(finished):
    card = model_card("mine", "", CONFIG, finished)
    assert "12,345 parameters" in card and "678 tokens" in card
    assert "| web | CC0 | 3 | 2 | 0.00 | short 1 |" in card
    assert "### 06_evaluate\n\nloss 1.5\n\n## Samples" in card
    assert "With transformers 4.57 or 5, in the folder of this card:" in card
    assert "from_pretrained('.')" in card
    assert "Normalise your prompts in the same way." in card
    assert json.dumps(CONFIG["pretrain"], indent=2) in card


def test_a_missing_record_is_named(finished):
    (finished["06_evaluate"] / "stage.json").unlink()
    with pytest.raises(RecipeError, match=r"06_evaluate/stage\.json: cannot be read. Run it again: "):
        model_card("mine", "", CONFIG, finished)


def test_an_edited_copy_of_a_model_changes_nothing_in_the_stage_it_comes_from(tmp_path):
    source, target = tmp_path / "12_finetune", tmp_path / "16_export"
    source.mkdir()
    target.mkdir()
    (source / "config.json").write_text("{}")
    copy_model(source, target)
    assert (target / "config.json").read_text() == "{}"
    with (target / "config.json").open("a") as handle:
        handle.write("edited")
    assert (source / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("private", "found", "pushed"),
    [(True, True, True), (True, False, False), (False, False, True), (False, True, True)],
)
def test_a_private_model_is_not_pushed_to_a_public_repository(monkeypatch, tmp_path, private, found, pushed):
    """The hub ignores `private` for a repository that exists, and it knows the owner of a bare name."""

    class Hub:
        create_repo = staticmethod(lambda *_, **__: SimpleNamespace(repo_id="me/model"))

        @staticmethod
        def repo_info(repository):
            assert repository == "me/model"
            return SimpleNamespace(private=found)

        upload_folder = staticmethod(lambda **_: SimpleNamespace(commit_url="the address"))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    if pushed:
        assert push(tmp_path, "model", private) == "the address"
        return
    with pytest.raises(RecipeError, match="'me/model': this repository is public.*hub_private_repo"):
        push(tmp_path, "model", private)


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RecipeError, match="push to 'me/model' failed: .*Check the name, the network"):
        push(tmp_path, "me/model", True)
