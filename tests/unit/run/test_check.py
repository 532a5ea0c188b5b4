"""What a run will read from servers is asked for before the first stage, not hours later."""

import http.server
import json
import shutil
import threading

import pytest
from recipe import project
from recipe.config import recipe as recipes
from recipe.config.recipe import load_recipe
from recipe.evaluation.tasks import files
from recipe.project import Refused
from recipe.run import check

PAIRS = {"magpie": "llm-jp/magpie-sft-v1.0", "dolly": "kunishou/databricks-dolly-15k-ja"}


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's answers: some have another name now, some are gated."""

    def do_GET(self):
        content = json.dumps({"siblings": [], "gated": "dolly" in self.path and "auto"}).encode()
        self.send_response(404 if "magpie" in self.path or "/models/rinna/" in self.path else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server in place of the hub; no token, no downloads, no finished stages."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "HF_TOKEN": "",
        "HF_TOKEN_PATH": str(tmp_path / "none"),
        "HF_HUB_OFFLINE": "0",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(project, "OUTPUTS", tmp_path)
    monkeypatch.setattr(files, "DATA", tmp_path / "data")
    yield
    server.shutdown()
    server.server_close()


def needed(config=None, first=0, last=99):
    return check.fetched_later("small", config or load_recipe("small"), first, last)


def test_what_each_stage_will_read_from_a_server(hub):
    found = needed()
    assert found["dataset.json: sources.wikipedia"] == ("02_dataset", "datasets", "wikimedia/wikipedia")
    assert found["instruction.json: pairs.dolly"] == ("11_dataset", "datasets", PAIRS["dolly"])
    stage, kind, url = found["evaluation.json: tasks.jnli"]
    assert (stage, kind) == ("06_evaluate", "url") and url.startswith("https://raw.githubusercontent.com/")
    assert len(found) == 7 and needed(first=5, last=5) == {}
    assert {remote.stage for remote in needed(first=7).values()} == {"11_dataset", "14_evaluate"}


def test_a_finished_stage_and_a_local_folder_need_no_server(hub, tmp_path):
    (tmp_path / "small/02_dataset").mkdir(parents=True)
    (tmp_path / "small/02_dataset/stage.json").write_text("{}")
    config = load_recipe("small")
    config["instruction"]["pairs"]["magpie"]["dataset"] = str(tmp_path)
    assert {where for where in needed(config) if "tasks" not in where} == {"instruction.json: pairs.dolly"}


def test_the_data_of_a_finished_stage_are_needed_when_it_is_forced(hub, tmp_path):
    (tmp_path / "small/11_dataset").mkdir(parents=True)
    (tmp_path / "small/11_dataset/stage.json").write_text("{}")
    assert needed(first=11, last=11) == {}
    again = check.fetched_later("small", load_recipe("small"), 11, 11, force=True)
    assert list(again) == [f"instruction.json: pairs.{name}" for name in PAIRS]


def test_a_published_model_is_asked_for_unless_it_is_here(hub, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    config, name = load_recipe("gpt2-medium-aozora"), "rinna/japanese-gpt2-medium"
    found = check.fetched_later("gpt2-medium-aozora", config, 3, 5)
    keys = {"03_tokenizer": "tokenizer.json: published", "05_pretrain": "pretrain.json: initial_model"}
    assert found == {where: (stage, "models", name) for stage, where in keys.items()}
    with pytest.raises(Refused, match=f"published: {name} does not exist on the hub.*initial_model: {name}"):
        list(check.check_reachable(found))
    snapshot = tmp_path / "cache/models--rinna--japanese-gpt2-medium"
    for path, content in (("refs/main", "0" * 40), (f"snapshots/{'0' * 40}/config.json", "{}")):
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / path).write_text(content)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").touch()
    (tmp_path / "model/config.json").write_text('{"model_type": "gpt2"}')
    config["pretrain"]["initial_model"] = str(tmp_path / "model")
    assert check.fetched_later("gpt2-medium-aozora", config, 3, 5) == {}


def test_gated_and_renamed_data_sets_are_refused_before_the_first_stage(hub):
    with pytest.raises(Refused) as raised:
        list(check.check_reachable(needed(last=11)))
    message = str(raised.value)
    assert f"instruction.json: pairs.magpie: {PAIRS['magpie']} does not exist on the hub" in message
    assert f"instruction.json: pairs.dolly: {PAIRS['dolly']} is gated. Accept its terms on" in message
    assert "sources" not in message  # they are served
    assert list(check.check_reachable(needed(first=2, last=2))) == []


def test_servers_that_do_not_answer_are_noted(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines = list(check.check_reachable(needed()))
    assert len(lines) == 7 and all(line.startswith("note: ") for line in lines)
    assert lines[-1].startswith("note: evaluation.json: tasks.jsquad: stage 06 will read https://raw")
    assert all(line.endswith("but the environment says offline") for line in lines)
    assert list(check.check_reachable({})) == []


def check_of(monkeypatch, *options):
    """The exit code of the check of tiny; 0 where it accepts the recipe."""
    monkeypatch.setattr("sys.argv", ["check", *options])
    try:
        check.main()
    except SystemExit as ended:
        return ended.code
    return 0


NO_PAIRS = ("--set", "instruction.pairs={}")


def test_stages_that_the_recipe_skips_are_not_checked(hub, monkeypatch, capsys):
    sharded = ("--from", "12", "--deepspeed", "zero4")
    assert check_of(monkeypatch, *sharded) == 2 and "zero4: no such file" in capsys.readouterr().err
    monkeypatch.setattr(check, "check_available", lambda config: pytest.fail("stage 14 asks no task"))
    assert check_of(monkeypatch, *sharded, *NO_PAIRS) == 0, capsys.readouterr().err
    assert needed(load_recipe("small", NO_PAIRS[1:]), first=7) == {}


def test_a_push_without_a_name_is_refused_before_the_first_stage(hub, monkeypatch, capsys):
    assert check_of(monkeypatch, "--to", "01", "--set", "finetune.push_to_hub=true") == 2
    assert "finetune.json: push_to_hub: it needs hub_model_id" in capsys.readouterr().err


def test_a_push_is_read_from_one_file(hub, monkeypatch, capsys):
    assert check_of(monkeypatch, "--to", "01", "--set", "pretrain.push_to_hub=true") == 2
    assert "pretrain.json: push_to_hub: stage 16 reads it from finetune.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "option", "message"),
    [
        ("tiny", 'dataset.engine={"executor":"slurm","partition":"a","time":"1:00:00"}', "no sbatch"),
        ("gpt2-xl", 'tokenizer.segmenter="jumanpp"', "`jumanpp` is not on PATH"),
        ("gpt2-xl", 'tokenizer.segmenter="mecab"', "apt-get and dpkg-deb, which could download it"),
    ],
)
def test_a_missing_program_is_named_before_the_first_stage(
    hub, monkeypatch, capsys, tmp_path, recipe, option, message
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_of(monkeypatch, "--recipe", recipe, "--set", option) == 2
    assert message in capsys.readouterr().err


QUESTIONS = [{"instruction": f"{i}番の質問", "output": "はい。"} for i in range(60)]
PREFERRED = [{"prompt": f"{i}番の質問", "chosen": "はい。", "rejected": "いいえ。"} for i in range(60)]
GRPO = {"method": "grpo", "rewards": {"length": {}}, "max_completion_length": 8}


@pytest.mark.parametrize(
    ("file", "rows", "changes", "message"),
    [
        ("instruction", [*QUESTIONS, {"question": "?"}], {}, "line 61: no column 'instruction'"),
        ("instruction", QUESTIONS[:2], {}, "there are no pairs on the valid side"),
        ("preference", [*PREFERRED, {"prompt": "?", "chosen": "!"}], {}, "line 61: no column 'rejected'"),
        ("preference", PREFERRED[:2], {}, "there are no preferences on the valid side"),
        ("preference", [*QUESTIONS, {"question": "?"}], GRPO, "line 61: no column 'instruction'"),
    ],
)
def test_a_bad_row_of_own_pairs_is_named_before_the_first_stage(
    hub, monkeypatch, capsys, tmp_path, file, rows, changes, message
):
    def check_rows(rows, *options):
        own.write_text("\n".join(map(json.dumps, rows)), "utf-8")
        return check_of(monkeypatch, "--recipe", "mine", *options)

    own = tmp_path / "own.jsonl"
    values = {"pairs": {"own": {"path": str(own)}}} | changes
    if file == "instruction":
        values |= {"extends": "tiny"}
    else:
        values |= {"block_size": 64, "learning_rate": 1e-6}
        values |= {"global_batch_size": 16, "per_device_train_batch_size": 8}
    monkeypatch.setattr(recipes, "CONFIGS", tmp_path / "configs")
    shutil.copytree(project.CONFIGS / "tiny", tmp_path / "configs/tiny")
    shutil.copytree(project.CONFIGS / "tiny", tmp_path / "configs/mine")
    (tmp_path / f"configs/mine/{file}.json").write_text(json.dumps(values))

    assert check_rows(rows) == 2
    assert message in capsys.readouterr().err
    assert check_rows(rows, "--to", "10") == 0, capsys.readouterr().err
    whole = PREFERRED if file == "preference" and not changes else QUESTIONS
    assert check_rows(whole) == 0, capsys.readouterr().err
    stage = tmp_path / "mine" / {"instruction": "11_dataset", "preference": "13_preference"}[file]
    stage.mkdir(parents=True)
    (stage / "stage.json").write_text("{}")
    assert check_rows(rows) == 0, "a finished stage has read its rows"
    assert check_rows(rows, "--force") == 2
