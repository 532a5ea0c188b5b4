"""Tasks by the names of lm-evaluation-harness: found without it, refused where they cannot run, scored."""

import json
import subprocess
import sys

import pytest
from conftest import SHAPE, sentences
from recipe.config import tasks as task_files
from recipe.evaluation.tasks import available
from recipe.project import RecipeError, Refused

NAMES = (
    ("japanese_leaderboard", 8, "ja_leaderboard_jnli", ("Rakuten/JGLUE", "JNLI")),
    ("belebele_jpn_Jpan", 1, "belebele_jpn_Jpan", ("facebook/belebele", "jpn_Jpan")),
    ("mgsm_direct", 11, "mgsm_direct_ja", ("juletxara/mgsm", "ja")),
    ("global_mmlu_full_ja", 57, "global_mmlu_full_ja_anatomy", ("CohereForAI/Global-MMLU", "ja")),
    (
        "global_piqa_nonparallel_cloze_jpn_jpan",
        1,
        "global_piqa_nonparallel_cloze_jpn_jpan",
        ("mrlbenchmarks/global-piqa-nonparallel", "jpn_jpan"),
    ),
)


@pytest.mark.parametrize(("name", "count", "task", "data"), NAMES)
def test_tasks_groups_and_tags_are_found(name, count, task, data):
    """A task, a group, a group of groups of tags, and a tag that is only in an included file."""
    found = task_files.single_tasks(name)
    assert len(found) == count
    assert (found[task]["dataset_path"], found[task]["dataset_name"]) == data


@pytest.mark.slow
def test_every_name_of_the_harness_is_found():
    """The search by lines of YAML against the harness's own index."""
    from lm_eval.tasks import TaskManager

    assert not set(TaskManager().all_tasks) - task_files.harness_files().keys()


def test_a_named_task_is_checked_without_the_harness():
    """Names are checked before every stage, so without importing torch, which takes seconds."""
    code = (
        "import sys; from recipe.config.recipe import load_recipe; import recipe.evaluation.tasks.available; "
        "load_recipe('tiny', ['evaluation.tasks={\"japanese_leaderboard\": {}}']); "
        "sys.exit(bool({'torch', 'lm_eval', 'datasets'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def evaluation(**tasks):
    return {"evaluation": {"tasks": tasks}}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of data sets, and no hub."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


def test_data_that_are_not_at_hand_are_refused_with_what_to_fetch(cache):
    with pytest.raises(Refused) as raised:
        available.check_available(evaluation(ja_leaderboard_jnli={}))
    message = str(raised.value)
    assert message.startswith("evaluation.json: tasks.ja_leaderboard_jnli: its data, Rakuten/JGLUE (JNLI),")
    assert "datasets.load_dataset('Rakuten/JGLUE', 'JNLI')" in message and "Rakuten___jglue" in message
    assert str(cache) in message and "offline" in message


def test_data_in_the_cache_are_taken(cache):
    (cache / "Rakuten___jglue/JSQuAD/0.0.0/1").mkdir(parents=True)
    with pytest.raises(Refused, match=r"\(JNLI\)"):
        available.check_available(evaluation(ja_leaderboard_jnli={}))
    (cache / "Rakuten___jglue/JNLI/0.0.0/1").mkdir(parents=True)
    available.check_available(evaluation(ja_leaderboard_jnli={}))


@pytest.mark.parametrize(("address", "answers"), [("here", True), ("http://127.0.0.1:9", False)])
def test_the_hub_is_asked_for_data_that_are_not_cached(cache, monkeypatch, address, answers):
    """A hub that answers, whatever it says, will be asked for the data in the run."""
    import http.server
    import threading

    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # answers 501
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", here if address == "here" else address)
    try:
        if answers:
            available.check_available(evaluation(ja_leaderboard_jnli={}))
        else:
            with pytest.raises(Refused, match="127.0.0.1:9 does not answer"):
                available.check_available(evaluation(ja_leaderboard_jnli={}))
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_hub_whose_address_has_no_scheme_is_named(cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    with pytest.raises(Refused, match="HF_ENDPOINT is hub.example, .* expected https:// before it"):
        available.check_available(evaluation(ja_leaderboard_jnli={}))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"humaneval": {}}, "runs the code that the model writes"),
        ({"mmmu_val_art": {}}, "images or sound"),
        ({"xwinograd": {}, "xwinograd_jp": {}}, "holds xwinograd_jp, as tasks.xwinograd does"),
    ],
)
def test_tasks_that_cannot_run_are_refused(cache, tasks, message):
    with pytest.raises(Refused, match=message):
        available.check_available(evaluation(**tasks))


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder for tasks of our own, with rows that they can ask about."""
    monkeypatch.setattr(task_files, "OWN", tmp_path)
    task_files.own_tasks.cache_clear()
    rows = [{"question": f"{i}回?", "answer": f"{i}回です", "choices": ["高い", "低い"]} for i in range(7)]
    lines = "".join(json.dumps(row | {"label": i % 2}) + "\n" for i, row in enumerate(rows))
    (tmp_path / "rows.jsonl").write_text(lines, "utf-8")
    yield tmp_path
    task_files.own_tasks.cache_clear()


def write_yaml(folder, name, **values):
    data = {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")}
    common = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test", "task": name}
    # JSON is YAML.
    (folder / f"{name}.yaml").write_text(json.dumps(common | values), "utf-8")


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": "label",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def test_a_task_without_its_file_or_its_package_is_refused(own):
    (own / "scoring.py").write_text("import json\nimport a_package_that_nobody_has\n", "utf-8")
    write_yaml(own, "quiz", **CHOICE)
    path = own / "quiz.yaml"
    path.write_text(path.read_text("utf-8")[:-1] + ", process_docs: !function scoring.clean}", "utf-8")
    with pytest.raises(Refused, match="not installed: a_package_that_nobody_has"):
        available.check_available(evaluation(quiz={}))
    (own / "scoring.py").write_text("import json\n", "utf-8")
    available.check_available(evaluation(quiz={}))
    (own / "rows.jsonl").unlink()
    with pytest.raises(Refused, match="rows.jsonl: there is no such file"):
        available.check_available(evaluation(quiz={}))


@pytest.fixture(scope="module")
def trained():
    """A tokenizer with its template, and a model with random weights."""
    from recipe.config.chat_templates import chat_template
    from recipe.model.build import build_model
    from recipe.tokenization.train import train_tokenizer

    tokenizer = train_tokenizer(sentences(2000, 1), {"vocab_size": 400}).tokenizer
    tokenizer.chat_template = chat_template("chat")
    return tokenizer, build_model({"model_type": "qwen3", **SHAPE}, tokenizer, "sdpa", 0).eval()


def ask(trained, tasks, **options):
    from recipe.evaluation.tasks.harness import Harness, load_tasks, run_tasks

    tokenizer, model = trained
    asked = Harness(model, tokenizer, 4, False)
    return asked, run_tasks(asked, load_tasks(tasks), **options)


def test_a_group_is_scored_as_a_whole_and_by_member(own, trained):
    from recipe.evaluation.tasks.harness import scores_of, scores_table

    for name in ("high", "low"):
        write_yaml(own, name, num_fewshot=1, **CHOICE)
    group = {"group": "both", "task": ["high", "low"], "aggregate_metric_list": [{"metric": "acc"}]}
    (own / "both.yaml").write_text(json.dumps(group), "utf-8")
    available.check_available(evaluation(both={}))
    _, results = ask(trained, [{"task": "both", "num_fewshot": 2}], most=5)
    found = scores_of(results)
    assert list(found) == ["both", "high", "low"]
    assert found["both"]["items"] == 10 and found["high"]["items"] == 5
    assert found["both"]["score"] == pytest.approx((found["high"]["score"] + found["low"]["score"]) / 2)
    assert found["high"]["random"] == 0.5 and found["both"]["random"] is None
    # The delimiter of the harness, a space, is part of the answer; two shots come before the question.
    prompt, answer = results["samples"]["high"][0]["arguments"][0]
    assert answer == " 高い" and prompt.count("\n\n") == 2 and prompt.endswith("0回?")
    assert f"| both | acc | 10 | {found['both']['score']:.1%} (" in scores_table({"score": found})


def test_generated_answers_are_scored_and_limited_to_half_of_the_positions(own, trained):
    from recipe.evaluation.tasks.harness import scores_of

    metrics = [{"metric": "exact_match", "aggregation": "mean"}, {"metric": "bleu", "aggregation": "bleu"}]
    options = {"until": ["\n"], "max_gen_toks": 500}
    text = {"doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
    write_yaml(
        own, "writing", output_type="generate_until", generation_kwargs=options, metric_list=metrics, **text
    )
    asked, results = ask(trained, [{"task": "writing"}], chat=True, most=3)
    figures = scores_of(results)["writing"]
    assert asked.shortened == 3
    assert (figures["metric"], figures["items"], figures["share"]) == ("exact_match", 3, True)
    assert figures["bleu"] >= 0 and figures["majority"] is None


def test_the_beginning_of_an_answer_is_not_ended_in_the_chat_form(own, trained):
    from recipe.conversations.encode import encode_conversation

    write_yaml(own, "begun", gen_prefix="答え:", **CHOICE)
    asked, results = ask(trained, [{"task": "begun"}], chat=True, most=1)
    ids = asked.tok_encode(results["samples"]["begun"][0]["arguments"][0][0])
    tokenizer, _ = trained
    messages = [{"role": "user", "content": "0回?"}, {"role": "assistant", "content": "答え:"}]
    assert [*ids, tokenizer.eos_token_id] == encode_conversation(tokenizer, messages)[0]


def test_perplexity_is_that_of_a_document_and_no_share(own, trained):
    import torch
    from recipe.evaluation.tasks.harness import scores_of, scores_table
    from recipe.tokenization.encode_text import prompt_ids

    tokenizer, model = trained
    metric = [{"metric": "word_perplexity"}]
    text = {"doc_to_text": "", "doc_to_target": "{{answer}}"}
    write_yaml(own, "texts", output_type="loglikelihood_rolling", metric_list=metric, **text)
    _, results = ask(trained, [{"task": "texts"}], most=3)
    ids = prompt_ids(tokenizer, "0回です")
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    expected = sum(logits[i, token].item() for i, token in enumerate(ids[1:]))
    assert results["samples"]["texts"][0]["resps"][0][0] == pytest.approx(expected, rel=1e-5)
    figures = scores_of(results)["texts"]
    assert figures["share"] is False and figures["low"] is None and figures["score"] > 1
    assert f"| {figures['score']:.4g} |" in scores_table({"score": scores_of(results)})


def test_several_filters_are_several_metrics():
    from recipe.evaluation.tasks.harness import scores

    rows = [
        {
            "metrics": ["exact_match"],
            "filter": name,
            "exact_match": value,
            "target": "1",
            "arguments": [("",)],
        }
        for name, values in (("strict", (0, 0, 1, 0)), ("flexible", (1, 1, 1, 0)))
        for value in values
    ]
    figures = scores(rows, {"exact_match,strict": 0.25, "exact_match,flexible": 0.75})
    assert (figures["metric"], figures["items"], figures["score"]) == ("exact_match,strict", 4, 0.25)
    assert figures["exact_match,flexible"] == 0.75


def test_a_task_that_the_harness_cannot_load_is_named(own):
    from recipe.evaluation.tasks.harness import load_tasks

    write_yaml(own, "broken", **CHOICE | {"metric_list": [{"metric": "no such metric"}]})
    with pytest.raises(
        RecipeError, match="evaluation.json: tasks.broken: lm-evaluation-harness cannot load it"
    ):
        load_tasks([{"task": "broken"}])


@pytest.mark.slow
def test_a_group_of_our_own_can_hold_tasks_of_the_harness(own, cache):
    """The harness's index is searched as well; its data, which are not here, are what is missing."""
    from recipe.evaluation.tasks.harness import load_tasks

    write_yaml(own, "quiz", **CHOICE)
    group = {"group": "suite", "task": ["quiz", "belebele_jpn_Jpan"]}
    (own / "suite.yaml").write_text(json.dumps(group), "utf-8")
    assert task_files.single_tasks("suite").keys() == {"quiz", "belebele_jpn_Jpan"}
    with pytest.raises(RecipeError, match="facebook/belebele"):
        load_tasks([{"task": "suite"}])
