"""The recipes of the reference systems, cut down, through the real stages on small files in the real formats
of their sources.

Cut down are the layers (2), the width (8 for each head), the vocabulary, the accumulation and the warm-up;
everything else is as shipped: kinds and shape otherwise, optimizer, schedule, epochs, block, templates.
"""

from __future__ import annotations

import bz2
import json
import lzma
import math
import random

import pytest

KANJI = [chr(code) for code in range(0x4E00, 0x5800, 5)]
KANA = [chr(code) for code in range(0x3042, 0x3094)]


def sentence(draw: random.Random) -> str:
    """A sentence of 40 letters; random, so that no rule against repetition and no duplicate finds it."""
    return "".join(draw.choice(KANJI if draw.random() < 0.4 else KANA) for _ in range(40)) + "。"


def article(seed: object, sentences: int = 15) -> str:
    """A text that the rules for web pages accept."""
    draw = random.Random(str(seed))
    return "".join(sentence(draw) for _ in range(sentences))


def write_dump(path, count):
    """A `pages-articles` export, two streams long, with a redirect, a template page and a disambiguation
    page.
    """
    pages = [
        (f"記事{n}", 0, f"'''記事{n}'''は[[記事]]である。\n\n== 概要 ==\n{article(n)}\n")
        for n in range(count)
    ]
    pages += [
        ("別名", 0, "#REDIRECT [[記事0]]"),
        ("Template:Main", 10, "ひな型"),
        ("曖昧", 0, "* [[記事1]]\n* [[記事2]]\n{{Aimai}}"),
    ]
    head = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="ja">\n'
    body = [
        f"<page><title>{title}</title><ns>{namespace}</ns><id>{number}</id>"
        + ('<redirect title="記事0" />' if title == "別名" else "")
        + f"<revision><id>1</id><model>wikitext</model><text>{text}</text></revision></page>\n"
        for number, (title, namespace, text) in enumerate(pages, 1)
    ]
    streams = [head, "".join(body), "</mediawiki>\n"]
    path.write_bytes(b"".join(bz2.compress(stream.encode()) for stream in streams))


def published_tokenizer(folder):
    """A tokenizer in the form of rinna's: SentencePiece with [PAD], NFKC and lower case."""
    import sentencepiece as spm

    folder.mkdir()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([article(n, 3) for n in range(300)]),
        model_prefix=str(folder / "spiece"),
        vocab_size=1500,
        byte_fallback=False,
        normalization_rule_name="nmt_nfkc_cf",
        user_defined_symbols=["[PAD]"],
        minloglevel=2,
    )
    config = {
        "tokenizer_class": "T5Tokenizer",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "[PAD]",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """By kind, small files as the sources publish them."""
    import datasets

    folder = tmp_path_factory.mktemp("published")
    write_dump(folder / "jawiki-latest-pages-articles-multistream.xml.bz2", 60)
    cc100 = "\n\n".join("\n".join(article((n, line), 5) for line in range(4)) for n in range(60))
    (folder / "ja.txt.xz").write_bytes(lzma.compress((cc100 + "\n").encode()))
    for name, configuration in (("wikipedia", "20231101.ja"), ("aozora", ".")):
        rows = {"text": [article((name, n)) for n in range(80)], "title": [f"題{n}" for n in range(80)]}
        (folder / name / configuration).mkdir(parents=True)
        datasets.Dataset.from_dict(rows).to_parquet(
            folder / name / configuration / "train-00000-of-00001.parquet"
        )
    published_tokenizer(folder / "tokenizer")
    write_pairs(folder)
    return folder


def write_pairs(folder):
    """Instructions as kunishou/databricks-dolly-15k-ja and llm-jp/oasst1-21k-ja publish them."""
    dolly = [
        {
            "index": str(n),
            "category": "closed_qa",
            "instruction": f"{n}番の文を要約してください。",
            "input": article(("input", n), 2) if n % 2 else "",
            "output": article(("output", n), 1),
        }
        for n in range(80)
    ]
    oasst = [
        {
            "conversations": [
                {"from": "human", "value": f"{n}番は何ですか?"},
                {"from": "gpt", "value": article(("answer", n), 1)},
                {"from": "human", "value": "もう少し詳しく。"},
                {"from": "gpt", "value": article(("more", n), 1)},
            ]
        }
        for n in range(80)
    ]
    for name, rows in (("dolly", dolly), ("oasst", oasst)):
        (folder / name).mkdir()
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (folder / name / "train.jsonl").write_text(text, "utf-8")


@pytest.fixture(scope="module")
def project(make_project):
    """One project for all recipes: what they share is made once and taken over, as for a user."""
    return make_project()


def shipped(project, recipe, file):
    """A file of a recipe as it lies in the project now."""
    return json.loads((project.folder / f"configs/{recipe}/{file}.json").read_text())


def cut_down(project, recipe, sources):
    """Make a shipped recipe small enough for a test; return its pretrain.json as shipped."""
    dataset = shipped(project, recipe, "dataset")
    files = {"wikipedia": "jawiki*.xml.bz2", "cc100": "ja.txt.xz"}
    for name, spec in dataset["sources"].items():
        spec.pop("minimum_megabytes", None)
        if spec.pop("url", None):
            spec["paths"] = [str(sources / files[name])]
        else:
            spec["dataset"] = str(sources / name)
    project.edit(recipe, "dataset", sources=dataset["sources"], valid_share=0.2)
    tokenizer = shipped(project, recipe, "tokenizer")
    if tokenizer["kind"] == "published":
        project.edit(recipe, "tokenizer", published=str(sources / "tokenizer"))
    else:
        project.edit(recipe, "tokenizer", vocab_size=1200)
    if "segmenter" in tokenizer:
        project.edit(recipe, "tokenizer", segmenter="sudachi")  # Juman++ is no Python package
    project.edit(recipe, "model", **narrow(shipped(project, recipe, "model")))
    lora = shipped(project, recipe, "finetune").get("lora")
    if lora:
        project.edit(recipe, "finetune", lora=lora | {"quantization": None})  # 4 bits want a GPU
    pretrain = shipped(project, recipe, "pretrain")
    micro = pretrain["per_device_train_batch_size"]
    warmup = pretrain.get("warmup_steps", 0)
    project.edit(
        recipe,
        "pretrain",
        global_batch_size=min(pretrain["global_batch_size"], 2 * micro if micro > 3 else 6 * micro),
        warmup_steps=min(warmup, 2),
        logging_steps=1,
        save_steps=0.5,  # of all steps
        torch_compile=False,  # a minute for each shape
    )
    return pretrain


def narrow(model):
    """The keys of a model.json that make it small: 2 layers, 8 dimensions for each head."""
    if model["model_type"] == "gpt2":
        return {"n_layer": 2, "n_embd": 8 * model["n_head"]}
    width = 8 * model["num_attention_heads"]
    return {
        "num_hidden_layers": 2,
        "hidden_size": width,
        "intermediate_size": width * model["intermediate_size"] // model["hidden_size"],
    }


def share_of_peak(values, step, warmup, steps):
    """The learning rate after so many steps as a share of its peak, by the definitions of the schedules."""
    if step < warmup:
        return step / warmup
    done = (step - warmup) / (steps - warmup)
    if values["lr_scheduler_type"] == "linear":
        return 1 - done
    floor = 0.0 if values["lr_scheduler_type"] == "cosine" else values["lr_scheduler_kwargs"]["min_lr_rate"]
    return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2


SHIPPED = [
    pytest.param("mistral-300m", {"wikipedia": 60, "cc100": 60}),
    pytest.param("mistral-300m-v2", {"wikipedia": 60, "cc100": 60}, marks=pytest.mark.slow),
    pytest.param("mistral-39m", {"wikipedia": 60, "cc100": 60}, marks=pytest.mark.slow),
    pytest.param("mistral-2b", {"wikipedia": 60, "cc100": 60}, marks=pytest.mark.slow),
    pytest.param("mistral-3b", {"wikipedia": 60, "cc100": 60}, marks=pytest.mark.slow),
    pytest.param("gpt2-medium-aozora", {"aozora": 80}, marks=pytest.mark.slow),
    pytest.param("gpt2-small", {"wikipedia": 80}, marks=pytest.mark.slow),
    pytest.param("gpt2-xl", {"wikipedia": 60, "cc100": 60}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("recipe", "kept"), SHIPPED)
def test_a_cut_down_recipe_trains_as_its_files_say(project, sources, recipe, kept):
    shape, original = shipped(project, recipe, "model"), cut_down(project, recipe, sources)
    project.run("run_all.sh", "--recipe", recipe, "--to", "05")
    check_data(project, recipe, kept)
    check_model(project, recipe, shape)
    check_training(project, recipe, original)


def check_data(project, recipe, kept):
    """Every document that the sources hold is there once; what is no article is counted."""
    funnel = project.figures(recipe, "02_dataset")
    assert {name: table["documents"]["out"] for name, table in funnel.items()} == kept
    if "cc100" in kept:
        dropped = funnel["wikipedia"]["documents"]["dropped"]
        assert dropped == {"redirect": 1, "not an article": 1, "disambiguation": 1}
    totals = project.figures(recipe, "04_tokenize")["totals"]
    assert totals["train"]["documents"] + totals["valid"]["documents"] == sum(kept.values())


def check_model(project, recipe, shape):
    """The saved model has the shipped shape but for what was cut, and the tokenizer's vocabulary and ids."""
    saved = json.loads(project.output(recipe, "05_pretrain", "config.json").read_text())
    kept = {key: value for key, value in shape.items() if key not in narrow(shape)}
    assert {key: saved[key] for key in kept} == kept
    figures = project.figures(recipe, "03_tokenizer")
    ids = {key: figures["special_ids"][key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    assert {key: saved[key] for key in ids} == ids
    assert saved["vocab_size"] == figures["vocabulary"]["size"]


def check_training(project, recipe, original):
    """Optimizer, decay, schedule, epochs and batch are those of the shipped pretrain.json."""
    import torch
    from recipe.token_files import TokenFile

    used, figures = shipped(project, recipe, "pretrain"), project.figures(recipe, "05_pretrain")
    active, steps = figures["active"], figures["steps"]
    tokens = len(TokenFile(project.output(recipe, "04_tokenize", "train")).tokens)
    blocks = math.ceil(tokens / original["block_size"])
    assert steps == math.ceil(original["num_train_epochs"] * blocks / used["global_batch_size"])
    assert active["optimizer"] == "AdamW" and active["fused"]
    assert active["scheduler"].startswith(original["lr_scheduler_type"] + " (")
    assert active["gradient_clipping"] == original["max_grad_norm"]
    assert active["micro_batch"] == original["per_device_train_batch_size"]
    assert active["global_batch"] == used["global_batch_size"]
    assert active["tokens_per_step"] == used["global_batch_size"] * original["block_size"]
    assert (active["attention"], active["parallel"], active["seed"]) == ("sdpa", "one process", 42)

    # The rate of every step, which is that of the schedule after the steps before it, and what the optimizer itself had in the last checkpoint.
    lines = project.output(recipe, "05_pretrain", "metrics.jsonl").read_text().splitlines()
    rates = {row["step"]: row["learning_rate"] for row in map(json.loads, lines) if "learning_rate" in row}
    warmup = used["warmup_steps"] if used["warmup_steps"] >= 1 else math.ceil(used["warmup_steps"] * steps)
    wanted = {
        step: original["learning_rate"] * share_of_peak(original, step - 1, warmup, steps) for step in rates
    }
    assert len(rates) == steps and rates == pytest.approx(wanted, rel=1e-6, abs=1e-15)
    checkpoints = project.output(recipe, "05_pretrain", "checkpoints")
    state = next(checkpoints.glob("*/optimizer.pt"))
    groups = torch.load(state, weights_only=True, map_location="cpu")["param_groups"]
    assert {group["initial_lr"] for group in groups} == {original["learning_rate"]}
    assert {tuple(group["betas"]) for group in groups} == {(0.9, original.get("adam_beta2", 0.999))}
    assert {group["eps"] for group in groups} == {original.get("adam_epsilon", 1e-8)}
    assert {group["weight_decay"] for group in groups} == {original["weight_decay"], 0.0}
