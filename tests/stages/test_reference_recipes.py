"""The recipes of published systems run through the real stages, cut down, on small files in the real formats.

Smaller are the layers, the heads and their size, the vocabulary, the accumulation and the warm-up. Everything
else is as shipped: the kind of model and its proportions, optimizer, schedule, epochs, block, templates. One
test makes only the number of layers smaller, and trains on random tokens.
"""

from __future__ import annotations

import bz2
import json
import lzma
import math
import random
import shutil

import pytest
from bench.preflight import inputs as random_inputs
from conftest import ROOT
from recipe.config.recipe import load_recipe
from recipe.run import preflight, probe
from recipe.run.launch_options import Launch
from recipe.run.memory import memory

STEPS = 4  # of a cut-down recipe whose steps are given
KANJI = [chr(code) for code in range(0x4E00, 0x5800, 5)]
KANA = [chr(code) for code in range(0x3042, 0x3094)]


def sentence(draw: random.Random) -> str:
    """A sentence of 40 random letters, which neither rules against repetition nor deduplication drop."""
    return "".join(draw.choice(KANJI if draw.random() < 0.4 else KANA) for _ in range(40)) + "。"


def article(seed: object, sentences: int = 15) -> str:
    """A text that the rules for web pages accept."""
    draw = random.Random(str(seed))
    return "".join(sentence(draw) for _ in range(sentences))


def write_dump(path, count):
    """Write a `pages-articles` export: articles in two streams, a redirect, a template, a disambiguation."""
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
    """Write a tokenizer like that of rinna: SentencePiece with [PAD], NFKC and lower case."""
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


def published_checkpoint(folder):
    """Write weights next to that tokenizer, in the shape of the cut-down recipe."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model = shipped("gpt2-medium-aozora", "model")
    torch.manual_seed(7)
    shape = model | narrow(model) | {"vocab_size": 1500, "bos_token_id": 1, "eos_token_id": 2}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder with small files of every source, in the form in which they are published."""
    import datasets

    folder = tmp_path_factory.mktemp("published")
    write_dump(folder / "jawiki-latest-pages-articles-multistream.xml.bz2", 40)
    cc100 = "\n\n".join("\n".join(article((n, line), 5) for line in range(4)) for n in range(40))
    (folder / "ja.txt.xz").write_bytes(lzma.compress((cc100 + "\n").encode()))
    for name, configuration, others in (
        ("wikipedia", "20231101.ja", ("id", "url", "title")),
        ("web", "sample_10BT", ("id", "dump", "url", "date")),
        ("aozora", ".", ("title",)),
    ):
        (folder / name / configuration).mkdir(parents=True)
        for shard in range(2):
            rows = {"text": [article((name, shard, n)) for n in range(20)]}
            rows |= {column: [f"{column} {n}" for n in range(20)] for column in others}
            path = folder / name / configuration / f"train-{shard:05d}-of-00002.parquet"
            datasets.Dataset.from_dict(rows).to_parquet(path)
    published_tokenizer(folder / "rinna")
    published_checkpoint(folder / "rinna")
    write_pairs(folder)
    return folder


def write_pairs(folder):
    """Write pairs in the form of databricks-dolly-15k-ja, oasst1-21k-ja and magpie-sft-v1.0."""
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
    magpie = [
        {
            "id": n,
            "conversations": [
                {"role": "user", "content": f"{n}番を説明してください。"},
                {"role": "assistant", "content": article(("magpie", n), 2)},
            ],
        }
        for n in range(80)
    ]
    for name, rows in (("dolly", dolly), ("oasst", oasst), ("magpie", magpie)):
        (folder / name).mkdir()
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (folder / name / "train.jsonl").write_text(text, "utf-8")


@pytest.fixture(scope="module")
def project(make_project):
    """One project for all recipes: a stage that they share is done once and taken over."""
    return make_project()


def shipped(recipe, file):
    """A file of a shipped recipe, as the stages see it."""
    return load_recipe(recipe)[file]


def cut_down(project, recipe, sources):
    """Make a recipe of the project small enough for a test."""
    dataset, tokenizer = shipped(recipe, "dataset"), shipped(recipe, "tokenizer")
    files = {"wikipedia": "jawiki*.xml.bz2", "cc100": "ja.txt.xz"}
    for name, spec in dataset["sources"].items():
        spec.pop("minimum_megabytes", None)
        if spec.pop("url", None):
            spec["paths"] = [str(sources / files[name])]
        else:
            spec["dataset"] = str(sources / name)
    project.edit(recipe, "dataset", sources=dataset["sources"], valid_share=0.2, disk_gigabytes=0.1)
    if tokenizer["kind"] == "published":
        project.edit(recipe, "tokenizer", published=str(sources / "rinna"))
        project.edit(recipe, "pretrain", initial_model=str(sources / "rinna"))
    else:
        project.edit(recipe, "tokenizer", vocab_size=1200)
    if "segmenter" in tokenizer:
        project.edit(recipe, "tokenizer", segmenter="sudachi")  # Juman++ is not a Python package
    project.edit(recipe, "model", **narrow(shipped(recipe, "model")))
    values, tuning = shipped(recipe, "pretrain"), shipped(recipe, "finetune")
    micro = values["per_device_train_batch_size"]
    small = {"logging_steps": 1, "save_steps": 0.5, "torch_compile": False}  # compiling takes a minute
    steps = {"max_steps": STEPS, "eval_steps": STEPS} if "max_steps" in values else {}
    most = micro * (2 if micro > 3 else 8)
    warmup = min(values["warmup_steps"], 1)
    batch = min(values["global_batch_size"], most)
    project.edit(recipe, "pretrain", global_batch_size=batch, warmup_steps=warmup, **small, **steps)
    if "lora" in tuning:
        small["lora"] = tuning["lora"] | {"quantization": None}  # 4 bits need a GPU
    project.edit(recipe, "finetune", global_batch_size=4, **small)
    project.edit(recipe, "evaluation", tasks={})  # those of JGLUE would be fetched
    pairs = shipped(recipe, "instruction")["pairs"]
    project.edit(
        recipe,
        "instruction",
        pairs={name: spec | {"dataset": str(sources / name)} for name, spec in pairs.items()},
    )


def narrow(model):
    """The keys of a model.json that make it small: 2 layers and few heads of 16 dimensions.

    A Mistral keeps its proportions.
    """
    if model["model_type"] == "gpt2":
        return {"n_layer": 2, "n_head": 2, "n_embd": 32}
    heads = model["num_attention_heads"] // 4
    return {
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": model["num_key_value_heads"] // 4,
        "hidden_size": 16 * heads,
        "intermediate_size": 16 * heads * model["intermediate_size"] // model["hidden_size"],
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
    pytest.param("mistral-300m", {"wikipedia": 40, "cc100": 40}),
    pytest.param("mistral-300m-v2", {"wikipedia": 40, "cc100": 40}, marks=pytest.mark.slow),
    pytest.param("mistral-39m", {"wikipedia": 40, "cc100": 40}, marks=pytest.mark.slow),
    pytest.param("mistral-2b", {"wikipedia": 40, "cc100": 40}, marks=pytest.mark.slow),
    pytest.param("mistral-3b", {"wikipedia": 40, "cc100": 40}, marks=pytest.mark.slow),
    pytest.param("gpt2-medium-aozora", {"aozora": 40}, marks=pytest.mark.slow),
    pytest.param("gpt2-small", {"wikipedia": 40}),
    pytest.param("small", {"wikipedia": 40, "web": 40}, marks=pytest.mark.slow),
    pytest.param("colab-t4", {"wikipedia": 40}, marks=pytest.mark.slow),
    pytest.param(
        "gpt2-xl",
        {"wikipedia": 40, "cc100": 40},
        marks=[pytest.mark.slow, pytest.mark.extra("sudachi")],
    ),
]


@pytest.mark.parametrize(("recipe", "kept"), SHIPPED)
def test_a_cut_down_recipe_trains_as_its_files_say(project, sources, recipe, kept):
    cut_down(project, recipe, sources)
    project.run("run_all.sh", "--recipe", recipe, "--to", "05", timeout=600)
    check_data(project, recipe, kept)
    check_model(project, recipe)
    check_batch_and_epochs(project, recipe)
    check_optimizer(project, recipe, "pretrain", "05_pretrain")


def check_data(project, recipe, kept):
    """Every document of the sources is there once; pages that are not articles are counted."""
    funnel = project.figures(recipe, "02_dataset")
    assert {name: table["documents"]["out"] for name, table in funnel.items()} == kept
    if "cc100" in kept:
        dropped = funnel["wikipedia"]["documents"]["dropped"]
        assert dropped == {"redirect": 1, "not an article": 1, "disambiguation": 1}
    totals = project.figures(recipe, "04_tokenize")["totals"]
    assert totals["train"]["documents"] + totals["valid"]["documents"] == sum(kept.values())


def check_model(project, recipe):
    """The saved model has the shipped shape except what was cut, and the tokenizer's size and ids."""
    saved = json.loads(project.output(recipe, "05_pretrain", "config.json").read_text())
    shape = shipped(recipe, "model")
    kept = {key: value for key, value in shape.items() if key not in narrow(shape)}
    assert {key: saved[key] for key in kept} == kept
    figures = project.figures(recipe, "03_tokenizer")
    ids = {key: figures["special_ids"][key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    assert {key: saved[key] for key in ids} == ids
    assert saved["vocab_size"] == figures["vocabulary"]["size"]


def check_batch_and_epochs(project, recipe):
    """Epochs, block and micro-batch are those of the shipped recipe."""
    from recipe.tokenization.token_files import TokenFile

    values, figures = shipped(recipe, "pretrain"), project.figures(recipe, "05_pretrain")
    active = figures["active"]
    blocks = math.ceil(
        len(TokenFile(project.output(recipe, "04_tokenize", "train")).tokens) / values["block_size"]
    )
    expected = values.get("num_train_epochs", 0) * blocks / active["global_batch"]
    assert figures["steps"] == (STEPS if "max_steps" in values else math.ceil(expected))
    assert active["tokens_per_step"] == active["global_batch"] * values["block_size"]
    assert active["micro_batch"] == values["per_device_train_batch_size"]
    assert active["accumulation"] > 1 or values["global_batch_size"] == active["micro_batch"]
    # GPT-2 has dropout in attention, which only SDPA computes.
    attention = "sdpa" if shipped(recipe, "model")["model_type"] == "gpt2" else "documents"
    assert (active["attention"], active["parallel"], active["seed"]) == (attention, "one process", 42)


def check_optimizer(project, recipe, file, stage):
    """Optimizer, decay and schedule are those of the shipped file.

    They are compared with what the check after the first step found active, with the log of every step, and
    with a checkpoint.
    """
    import torch

    values, figures = shipped(recipe, file), project.figures(recipe, stage)
    active, steps = figures["active"], figures["steps"]
    muon = values.get("muon_learning_rate")
    assert (active["optimizer"], active["fused"]) == (("MuonAdamW", False) if muon else ("AdamW", True))
    assert active["scheduler"].startswith(values["lr_scheduler_type"] + " (")
    assert active["gradient_clipping"] == values["max_grad_norm"]
    log = project.log(recipe, stage)
    rates = {row["step"]: row["learning_rate"] for row in log if "learning_rate" in row}
    warmup = json.loads(project.output(recipe, stage).read_text())["config"][file]["warmup_steps"]
    warmup = warmup if warmup >= 1 else math.ceil(warmup * steps)
    shares = {step: share_of_peak(values, step, warmup, steps) for step in range(steps + 1)}
    planned = {int(step): rate for step, rate in active["learning_rates"].items()}
    assert steps in planned  # the rate after the last step, which no step has
    for found, after in ((rates, -1), (planned, 0)):
        # Logged is the rate of the first group, which is Muon's.
        expected = {step: (muon or values["learning_rate"]) * shares[step + after] for step in found}
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-15)
    assert len(rates) == steps > 1
    saved = next(project.output(recipe, stage, "checkpoints").glob("*/optimizer.pt"))
    groups = torch.load(saved, weights_only=True, map_location="cpu")["param_groups"]
    assert {group["initial_lr"] for group in groups} == {
        muon or values["learning_rate"],
        values["learning_rate"],
    }
    assert {group["weight_decay"] for group in groups} == {values["weight_decay"], 0.0}
    groups = [group for group in groups if "betas" in group]  # without Muon's
    assert {tuple(group["betas"]) for group in groups} == {(0.9, values.get("adam_beta2", 0.999))}
    assert {group["eps"] for group in groups} == {values.get("adam_epsilon", 1e-8)}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [one.values[0] for one in SHIPPED])
def test_two_whole_layers_train_in_the_memory_announced(recipe, tmp_path, monkeypatch):
    """Two layers with the shipped widths, heads, block and vocabulary, and a few real steps."""
    monkeypatch.setattr(probe, "OUTPUTS", tmp_path)
    (tmp_path / recipe).mkdir()
    config = load_recipe(recipe, [])
    model, values = config["model"], config["pretrain"]
    model["n_layer" if model["model_type"] == "gpt2" else "num_hidden_layers"] = 2
    values["initial_model"] = None
    vocabulary, _ = preflight.vocabulary_of(recipe, config)
    plan = {"recipe": recipe, "config": config, "inputs": random_inputs(tmp_path, vocabulary)}
    row = probe.measure(ROOT / "pretrain/run_clm.py", plan, probe.Way(Launch(), 0, False), 1)
    assert row["outcome"] == "ok", row
    assert row["tokens"] == probe.STEPS * 2 * values["block_size"]
    values |= {"per_device_train_batch_size": 1, "global_batch_size": 2, "torch_compile": False}
    shape, setting, _ = preflight.on_this_machine(recipe, config, Launch())
    assert row["active"]["parameters"] == shape.parameters
    announced = memory(shape, setting)["peak"] / row["peak_memory_bytes"]
    print(f"{recipe}: {announced:.3f} of the measured peak announced")
    assert 0.9 < announced < 1.1


@pytest.mark.slow
def test_gpt2_medium_aozora_starts_from_the_published_weights(project, sources):
    from safetensors.torch import load_file

    recipe = "gpt2-medium-aozora"
    cut_down(project, recipe, sources)
    project.run("run_all.sh", "--recipe", recipe, "--to", "05")
    rate, steps = (
        shipped(recipe, "pretrain")["learning_rate"],
        project.figures(recipe, "05_pretrain")["steps"],
    )
    before = load_file(sources / "rinna/model.safetensors")
    after = load_file(project.output(recipe, "05_pretrain", "model.safetensors"))
    moved = max((after[name] - before[name]).abs().max().item() for name in before)
    assert 0 < moved < 2 * steps * rate  # random weights would differ by about 0.1


@pytest.mark.slow
def test_mistral_300m_is_tuned_in_the_form_of_alpaca(project, sources):
    from recipe.config.chat_templates import INPUT_HEADING
    from transformers import AutoTokenizer

    recipe = "mistral-300m"
    cut_down(project, recipe, sources)
    project.run("run_all.sh", "--recipe", recipe, "--to", "05")
    project.run("run_all.sh", "--recipe", recipe, "--from", "11", "--to", "14")
    check_optimizer(project, recipe, "finetune", "12_finetune")
    assert project.figures(recipe, "11_dataset")["pairs"]["dolly"] == {"in": 80, "out": 80, "dropped": {}}
    tokenizer = AutoTokenizer.from_pretrained(project.output(recipe, "12_finetune", "."))
    question = {"role": "user", "content": "要約してください。" + INPUT_HEADING + "湖は広い。"}
    text = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    assert text.startswith("<s>あなたは何でも正確に答えられるAIです。\n\n以下は、")
    assert text.endswith("### 指示:\n要約してください。\n\n### 入力:\n湖は広い。\n\n### 応答:\n")
    measured = project.figures(recipe, "14_evaluate")
    assert measured["conversations"] == len_of(project.output(recipe, "11_dataset", "valid.parquet"))
    assert measured["after"]["response_loss"] != measured["before"]["response_loss"]


@pytest.mark.slow
def test_small_goes_through_all_its_stages(project, sources):
    """From the data sets of the hub to the folder to take away, with pairs in both forms."""
    cut_down(project, "small", sources)
    shutil.copytree(project.folder / "configs/small", project.folder / "configs/evening")
    batch = {"global_batch_size": 2, "per_device_train_batch_size": 1, "max_steps": 2}
    project.edit("evening", "pretrain", eval_steps=2, **batch)
    project.edit("evening", "finetune", **batch)
    project.edit("evening", "generation", max_new_tokens=16)
    project.run("run_all.sh", "--recipe", "evening", timeout=600)
    pairs = project.figures("evening", "11_dataset")["pairs"]
    assert {name: counts["out"] for name, counts in pairs.items()} == {"magpie": 80, "dolly": 80}
    asked = {row["prompt"] for row in project.figures("evening", "15_generate")["answers"]}
    assert asked >= set(shipped("small", "generation")["questions"])
    assert project.output("evening", "16_export", "README.md").exists()


def len_of(path):
    """The number of rows of a Parquet file."""
    import pyarrow.parquet as pq

    return pq.read_metadata(path).num_rows


@pytest.mark.slow
def test_the_qlora_variant_shares_the_model_and_tunes_an_adapter(project, sources):
    for recipe in ("mistral-300m", "mistral-300m-qlora"):
        cut_down(project, recipe, sources)
        project.run("run_all.sh", "--recipe", recipe, "--to", "05")
    record = json.loads(project.output("mistral-300m-qlora", "05_pretrain").read_text())
    assert record["recipe"] == "mistral-300m"  # taken over, not trained again
    project.run("run_all.sh", "--recipe", "mistral-300m-qlora", "--from", "11", "--to", "12")
    check_optimizer(project, "mistral-300m-qlora", "finetune", "12_finetune")
    adapter = project.output("mistral-300m-qlora", "12_finetune", "adapter/adapter_config.json")
    values = json.loads(adapter.read_text())
    assert (values["r"], values["lora_alpha"]) == (128, 128)
    adapted = {name.rsplit(".", 1)[-1] for name in values["target_modules"]}
    assert adapted == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
