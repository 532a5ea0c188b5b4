"""The recipes of the reference systems, stages 01 to 04, on small files in the real formats of their
sources.
"""

from __future__ import annotations

import bz2
import json
import lzma
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
    return folder


@pytest.mark.parametrize(
    ("recipe", "settings", "kept"),
    [
        ("mistral-300m", ["tokenizer.vocab_size=1200"], {"wikipedia": 60, "cc100": 60}),
        ("gpt2-medium-aozora", ["tokenizer.published={folder}/tokenizer"], {"aozora": 80}),
        ("gpt2-small", ["tokenizer.vocab_size=1200"], {"wikipedia": 80}),
        (
            "gpt2-xl",
            ["tokenizer.vocab_size=1200", "tokenizer.segmenter=sudachi"],
            {"wikipedia": 60, "cc100": 60},
        ),
    ],
)
def test_reference_recipe_makes_token_files(make_project, sources, recipe, settings, kept):
    project = make_project()
    files = {"wikipedia": "jawiki*.xml.bz2", "cc100": "ja.txt.xz"}
    path = project.folder / f"configs/{recipe}/dataset.json"
    dataset = json.loads(path.read_text())
    for name, spec in dataset["sources"].items():
        spec.pop("minimum_megabytes", None)
        if spec.pop("url", None):
            spec["paths"] = [str(sources / files[name])]
        else:
            spec["dataset"] = str(sources / name)
    project.edit(recipe, "dataset", sources=dataset["sources"], valid_share=0.2)
    changes = [x for s in settings for x in ("--set", s.replace("{folder}", str(sources)))]
    project.run("run_all.sh", "--recipe", recipe, "--to", "04", *changes)
    funnel = project.figures(recipe, "02_dataset")
    assert {name: table["documents"]["out"] for name, table in funnel.items()} == kept
    if "cc100" in kept:
        dropped = funnel["wikipedia"]["documents"]["dropped"]
        assert dropped == {"redirect": 1, "not an article": 1, "disambiguation": 1}
    totals = project.figures(recipe, "04_tokenize")["totals"]
    assert totals["train"]["documents"] + totals["valid"]["documents"] == sum(kept.values())
