"""The suite `japanese`: its tasks exist, each form is read and scored, what cannot be reached is named."""

import http.server
import io
import json
import sys
import tarfile
import threading
from collections import Counter

import pytest
from conftest import SHAPE, sentences
from recipe.config import tasks as task_files
from recipe.config.recipe import load_recipe
from recipe.evaluation.tasks import available, files, items
from recipe.project import RecipeError, Refused

SUITE = task_files.SUITES["japanese"]
OF_HUB = [name for name in SUITE if task_files.brings_data(name)]

# Rows in the form of each data set on the hub: what `doc_to_text` and the functions of the task read.
ANSWERS = {"answers": {"text": ["富士山"], "answer_start": [0]}, "question": "一番高い山は?"}
ROWS = {
    "ja_leaderboard_jcommonsenseqa": {"question": "高いのは?", "label": 1}
    | {f"choice{i}": word for i, word in enumerate("海山川空谷")},
    "ja_leaderboard_jnli": {"sentence1": "山に登った。", "sentence2": "山に行った。", "label": 0},
    "ja_leaderboard_marc_ja": {"sentence": "良い品です。", "label": 0},
    "ja_leaderboard_jsquad": {"context": "山 [SEP] 富士山は高い。"} | ANSWERS,
    "ja_leaderboard_jaqket_v2": {"ctxs": {"text": ["富士山は高い。", "湖は広い。"]}} | ANSWERS,
    "ja_leaderboard_xlsum": {"text": "富士山に雪が降った。", "summary": "富士山に雪。"},
    "ja_leaderboard_xwinograd": {"sentence1": "山は高い。", "sentence2": "海は高い。", "answer": "1"},
    "ja_leaderboard_mgsm": {"question": "問題：1足す2は?", "answer": "答えは3", "answer_number": 3},
    "global_piqa_nonparallel_cloze_jpn_jpan": {
        "prompt": "皿を洗うには",
        "solution0": "水を使う。",
        "solution1": "砂糖を使う。",
        "label": 0,
    },
}
COPA = {
    "premise": "[彼女](母)は走った。",
    "answer1": "急いでいた。",
    "answer2": "寝ていた。",
    "correct_answer": 1,
}
SUBJECT = "".join(f'"{i}足す1はいくつ?",{i},{i + 1},{i + 2},{i + 3},B\n' for i in range(8))


def recipe(**values):
    """The recipe tiny with other values in evaluation.json."""
    return load_recipe("tiny", [f"evaluation.{key}={json.dumps(value)}" for key, value in values.items()])


def test_the_suite_is_added_to_the_tasks_and_an_entry_there_has_priority():
    config = recipe(suite="japanese", tasks={"jmmlu": {"path": "x"}, "reading": {"source": "tatoeba"}})
    tasks = config["evaluation"]["tasks"]
    assert tasks == SUITE | {"jmmlu": {"path": "x"}, "reading": {"source": "tatoeba"}}
    assert set(task_files.tasks_of(config, "06_evaluate")) == tasks.keys()
    assert "suite" not in recipe()["evaluation"]


@pytest.mark.parametrize("name", SUITE)
def test_every_task_of_the_suite_exists_with_these_shots(name):
    ((task, values),) = task_files.single_tasks(name).items()
    assert task == name
    assert values.get("num_fewshot") in (None, SUITE[name].get("num_fewshot", 0))


def test_published_scores_are_shares_of_tasks_of_the_suite():
    for scores in task_files.PUBLISHED.values():
        assert scores.keys() < SUITE.keys() and all(0 < score < 1 for score in scores.values())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"suite": "japanes"}, "suite.*Did you mean 'japanese'"),
        ({"skip_unavailable": True}, "only tasks of a suite can be skipped, and there is none"),
    ],
)
def test_a_wrong_suite_is_refused(values, expected):
    with pytest.raises(Refused, match=expected):
        recipe(**values)


# ----------------------------------------------------------------------------------------------------- forms


@pytest.fixture(scope="module")
def trained():
    """A tokenizer with its template, and a model with random weights."""
    from recipe.config.chat_templates import chat_template
    from recipe.model.build import build_model
    from recipe.tokenization.train import train_tokenizer

    tokenizer = train_tokenizer(sentences(2000, 1), {"vocab_size": 400}).tokenizer
    tokenizer.chat_template = chat_template("chat")
    shape = SHAPE | {"max_position_embeddings": 128}
    return tokenizer, build_model({"model_type": "qwen3", **shape}, tokenizer, "sdpa", 0).eval()


def ask(trained, tasks, **options):
    from recipe.evaluation.tasks.harness import Harness, load_tasks, run_tasks

    tokenizer, model = trained
    return run_tasks(Harness(model, tokenizer, 4, False), load_tasks(tasks), **options)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder for tasks of our own."""
    monkeypatch.setattr(task_files, "OWN", tmp_path)
    task_files.own_tasks.cache_clear()
    yield tmp_path
    task_files.own_tasks.cache_clear()


def local_copy(folder, name):
    """A task with the prompts, functions and metrics of `name`, whose data is a local file in its form."""
    ((_, path),) = task_files.harness_files()[name]
    rows = [ROWS[name] | {"id": i} for i in range(8)]
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    sides = dict.fromkeys(("train", "validation", "test"), str(folder / f"{name}.jsonl"))
    data = {"data_files": sides, "cache_dir": str(folder / "cache")}
    values = {"include": str(path), "task": f"local-{name}", "dataset_path": "json", "dataset_name": None}
    (folder / f"local-{name}.yaml").write_text(json.dumps(values | {"dataset_kwargs": data}), "utf-8")
    return {"task": f"local-{name}"} | SUITE[name]


def check_forms(trained, folder, names):
    from recipe.evaluation.tasks.harness import scores_of

    tasks = [local_copy(folder, name) for name in names]
    task_files.own_tasks.cache_clear()
    for chat in (False, True):
        results = ask(trained, tasks, chat=chat, most=2)
        found = scores_of(results)
        assert found.keys() == {f"local-{name}" for name in names}
        assert all(figures["items"] == 2 and 0 <= figures["score"] <= 1 for figures in found.values())
        for name in names:
            prompt = results["samples"][f"local-{name}"][0]["arguments"][0][0]
            if name.startswith("ja_leaderboard") and not chat and SUITE[name]["num_fewshot"]:
                assert prompt.count("### 応答：") == SUITE[name]["num_fewshot"] + 1, name
    return found


def test_each_form_of_the_hub_is_read_and_scored(own, trained):
    check_forms(trained, own, [name for name in OF_HUB if name != "ja_leaderboard_xlsum"])


@pytest.mark.extra("japanese")
def test_summaries_are_read_and_scored(own, trained):
    assert check_forms(trained, own, ["ja_leaderboard_xlsum"])["local-ja_leaderboard_xlsum"]["metric"]


@pytest.fixture
def repositories(tmp_path):
    """Japanese COPA and JMMLU in their own forms, a folder per task."""
    rows = [{"id": i, "asks_for": ("原因", "結果")[i % 2], **COPA} for i in (500, 501, 502)]
    (tmp_path / "copa").mkdir()
    (tmp_path / "copa/COPA-ja.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    write_archive(
        tmp_path / "mmlu", {"JMMLU/sums.csv": SUBJECT, "JMMLU_NC_ND/idioms.csv": "\ufeff" + SUBJECT}
    )
    return {"copa-ja": {"path": str(tmp_path / "copa")}, "jmmlu": {"path": str(tmp_path / "mmlu")}}


def write_archive(folder, members, encoding="utf-8"):
    folder.mkdir()
    with tarfile.open(folder / "1.tar.gz", "w:gz") as archive:
        for name, text in members.items():
            content = text.encode(encoding)
            member = tarfile.TarInfo(f"JMMLU-1/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_copa_and_jmmlu_run_on_their_own_files(repositories, trained, tmp_path):
    from recipe.evaluation.tasks.harness import scores_of

    config = {"dataset": {"sources": {}}, "evaluation": {"tasks": repositories}}
    tasks = items.write_tasks(config, tmp_path, tmp_path / "tasks", repositories, Counter())
    results = ask(trained, tasks)
    found = scores_of(results)
    # Of COPA the test set, without the first 500; of JMMLU all but five questions of each subject.
    assert [found[name]["items"] for name in repositories] == [2, 6]
    assert [found[name]["random"] for name in repositories] == [0.5, 0.25]
    asked = {sample["arguments"][0][0] for sample in results["samples"]["copa-ja"]}
    assert asked == {"彼女は走った。なぜなら、", "彼女は走った。だから、"}
    assert results["samples"]["copa-ja"][0]["arguments"][0][1] == "急いでいた。"
    (question,) = {s["arguments"][0][0] for s in results["samples"]["jmmlu"] if "質問:7足す" in str(s["doc"])}
    assert question.startswith("質問:0足す1はいくつ?\nA. 0\nB. 1\nC. 2\nD. 3\n答え:B\n\n質問:1足す")
    assert question.count("答え:") == 6 and question.endswith("D. 10\n答え:")
    assert results["samples"]["jmmlu"][0]["arguments"][1][1] == "B"


@pytest.mark.parametrize("row", ["a,b,c,d,B\n", "q,1,2,3,4,E\n"])
def test_rows_of_another_form_are_named(tmp_path, row):
    write_archive(tmp_path / "mmlu", {"JMMLU/sums.csv": SUBJECT + row})
    with pytest.raises(RecipeError, match=r"1\.tar\.gz: JMMLU-1/JMMLU/sums\.csv: row 9: not a row of jmmlu"):
        list(items.read_jmmlu("jmmlu", tmp_path / "mmlu/1.tar.gz", str))
    (tmp_path / "COPA-ja.jsonl").write_text(json.dumps({"id": 501, "asks_for": "理由", **COPA}), "utf-8")
    with pytest.raises(RecipeError, match="COPA-ja.jsonl: line 1: not a row of copa-ja: ValueError asks_for"):
        list(items.read_copa("copa-ja", tmp_path / "COPA-ja.jsonl", str))


def test_an_archive_in_another_encoding_is_named(tmp_path):
    write_archive(tmp_path / "mmlu", {"JMMLU/sums.csv": SUBJECT}, encoding="cp932")
    with pytest.raises(RecipeError, match=r"JMMLU/sums\.csv: not CSV in UTF-8: .*can't decode"):
        list(items.read_jmmlu("jmmlu", tmp_path / "mmlu/1.tar.gz", str))


def test_a_folder_without_the_archive_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"tasks.jmmlu.path: .* 0 files \*\.tar\.gz"):
        files.files_of("jmmlu", {"path": str(tmp_path)})


# ------------------------------------------------------------------------------------------ what is not there


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """No cache of data sets, no downloads, no hub; the packages of the extra seem to be there."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(files, "DATA", tmp_path / "data")
    for name in ("emoji", "fugashi"):
        if name not in sys.modules:
            (tmp_path / f"{name}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)


def test_offline_the_suite_is_refused_before_anything_starts(empty):
    with pytest.raises(Refused) as raised:
        available.check_available(recipe(suite="japanese", tasks={}))
    message = str(raised.value)
    assert all(f"tasks.{name}: " in message for name in SUITE)
    assert message.endswith('Or set "skip_unavailable": true, to go on without such tasks of japanese.')
    assert "COPA-ja.jsonl is not in data/" in message and '"copa-ja": {"path": FOLDER}' in message


def test_offline_the_tasks_are_skipped_by_name_where_the_suite_says_so(empty, repositories, tmp_path):
    skipped = available.check_available(recipe(suite="japanese", skip_unavailable=True, tasks=repositories))
    assert list(skipped) == OF_HUB  # the two others have their files
    assert "Rakuten/JGLUE (JNLI), are not in the cache" in skipped["ja_leaderboard_jnli"]
    listed = available.skipped_list(skipped)
    assert listed.startswith("Not asked (skip_unavailable):\n\n- ja_leaderboard_jcommonsenseqa: its data, ")
    # metrics.md becomes a part of the model card.
    assert str(tmp_path) not in listed
    assert listed.count("\n- ") == len(OF_HUB) and available.skipped_list({}) == ""


def test_a_task_outside_the_suite_is_refused_all_the_same(empty, repositories):
    tasks = repositories | {"belebele_jpn_Jpan": {}}
    with pytest.raises(Refused, match=r"^evaluation.json: tasks.belebele_jpn_Jpan: "):
        available.check_available(recipe(suite="japanese", skip_unavailable=True, tasks=tasks))


def test_missing_packages_are_named_with_the_extra(empty, repositories, tmp_path, monkeypatch):
    monkeypatch.setattr(available, "missing_packages", lambda extra: ["emoji", "fugashi", "unidic-lite"])
    (tmp_path / "emoji.py").unlink(missing_ok=True)
    if "emoji" in sys.modules:
        pytest.skip("could not run: emoji is installed")
    tasks = {"ja_leaderboard_xlsum": {}}
    with pytest.raises(Refused, match="not installed: emoji.*bash setup.sh --extra japanese"):
        available.check_available({"evaluation": {"tasks": tasks}})
    skipped = available.check_available(recipe(suite="japanese", skip_unavailable=True, tasks=repositories))
    assert "not installed: emoji" in skipped["ja_leaderboard_xlsum"]


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's answers about data sets: one is unknown, one is a script, one is gated."""

    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def do_GET(self):
        name = self.path.removeprefix("/api/datasets/")
        facts = {"siblings": [{"rfilename": "data/test.parquet"}], "gated": name == "juletxara/mgsm"}
        if name == "kumapo/JAQKET":
            facts["siblings"].append({"rfilename": "JAQKET.py"})
        content = json.dumps(facts).encode()
        self.send_response(404 if name == "mkshing/xlsum_ja" else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def test_the_hub_is_asked_what_it_serves_before_anything_starts(empty, repositories, tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    config = recipe(suite="japanese", skip_unavailable=True, tasks=repositories)
    try:
        skipped = available.check_available(config)
        del config["evaluation"]["skip_unavailable"]
        with pytest.raises(Refused, match="JAQKET.py, which datasets no longer runs"):
            available.check_available(config)
    finally:
        server.shutdown()
        server.server_close()
    assert skipped.keys() == {"ja_leaderboard_jaqket_v2", "ja_leaderboard_xlsum", "ja_leaderboard_mgsm"}
    assert "HTTP 404" in skipped["ja_leaderboard_xlsum"] and "is gated" in skipped["ja_leaderboard_mgsm"]


def test_a_task_that_cannot_be_loaded_is_skipped_with_the_reason(own, monkeypatch):
    from recipe.evaluation.tasks.harness import load_tasks

    task = local_copy(own, "ja_leaderboard_jnli")["task"]
    (own / "ja_leaderboard_jnli.jsonl").write_text("not JSON", "utf-8")
    task_files.own_tasks.cache_clear()
    skipped = {}
    monkeypatch.setitem(task_files.SUITES, "japanese", {task: {}})
    evaluation = {"suite": "japanese", "skip_unavailable": True}
    loaded = load_tasks([{"task": task}], evaluation, skipped)
    assert not loaded["tasks"] and skipped[task].startswith("lm-evaluation-harness cannot load it (")


def test_published_scores_stand_in_the_table():
    from recipe.evaluation.tasks.harness import scores_table

    figures = {"metric": "acc", "items": 9, "score": 0.5, "low": 0.2, "high": 0.8, "share": True}
    figures |= {"majority": 0.3, "random": 0.2}
    table = scores_table({"score": {"ja_leaderboard_jnli": figures, "jmmlu": figures}})
    assert (
        "| ja_leaderboard_jnli | acc | 9 | 50.0% (20.0% to 80.0%) | 30.1% | 37.7% | 30.0% | 20.0% |" in table
    )
    assert "| jmmlu | acc | 9 | 50.0% (20.0% to 80.0%) |  |  | 30.0% | 20.0% |" in table
    assert task_files.PUBLISHED_BY in table
    assert "rinna" not in scores_table({"score": {"jnli": figures}})
