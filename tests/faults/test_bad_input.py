"""What users and strangers give: text, archives, pairs, recipes, requests and templates that are wrong.

The tables are those of the unit tests, which check each message. Here all of them are counted: what is
refused by name has survived, what is used without a message is silently wrong, and any other exception fails
the test.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest
import zstandard
from conftest import sentences
from recipe.config import keys
from recipe.config.recipe import check_recipe, load_recipe
from recipe.conversations import encode, instructions
from recipe.corpus.readers import cap_bad, read_file
from recipe.project import RecipeError, Refused, nearest
from recipe.tokenization.train import train_tokenizer
from unit.config.test_keys import ABSURD, typos
from unit.config.test_ranges import VALUES, changed, paths
from unit.conversations.test_chat_template import BAD_TEMPLATES, QUESTION, with_template
from unit.conversations.test_instructions import NO_PAIRS
from unit.corpus.test_readers import (
    ARCHIVES,
    BODIES,
    FAULTS_IN_TEXT,
    LINES,
    LOGIN,
    PACK,
    write,
    write_parquet,
)
from unit.evaluation.test_page_guard import ATTACKS, answered

pytestmark = pytest.mark.faults


def refusal(call, *arguments):
    """The message of the RecipeError that a call raises, or an empty text."""
    try:
        call(*arguments)
    except RecipeError as error:
        return str(error)
    return ""


def flip(content, share):
    content = bytearray(content)
    content[int(len(content) * share)] ^= 1
    return bytes(content)


def dirty_files():
    """(name, content): text with one fault, archives that are cut or changed, web pages."""
    for name, content, *_ in FAULTS_IN_TEXT:
        yield name, content
    for kind, body in BODIES.items():
        for compression in ARCHIVES:
            packed = PACK[compression](body)
            if compression == ".zst":  # without a checksum, no reader can notice a changed bit
                packed = zstandard.ZstdCompressor(write_checksum=True).compress(body)
            for content in (packed[: len(packed) * 3 // 100], packed[: len(packed) // 2], packed[:-1]):
                yield f"a{kind}{compression}", content
            for content in (flip(packed, 0.3), flip(packed, 0.7), packed + b"more", LOGIN.encode(), b""):
                yield f"a{kind}{compression}", content
        yield f"a{kind}", LOGIN.encode()
    yield "a.parquet", LOGIN.encode()
    yield "a.parquet", b""


@pytest.mark.parametrize("tolerant", [False, True], ids=["strict", "tolerant"])
def test_dirty_text_and_archives(tmp_path, tolerant, fault_row):
    """Tolerant: at most one document in a thousand may be lost, and is counted."""
    table = [(f"{number}-{name}", content) for number, (name, content) in enumerate(dirty_files())]
    parquet = write_parquet(tmp_path / "a.parquet", LINES[:3000]).read_bytes()
    table += [(f"{i}.parquet", parquet[: len(parquet) * i // 4]) for i in (1, 2, 3)]
    silent = []
    for name, content in table:
        path = write(tmp_path, name, content)
        message = refusal(lambda path=path: list(cap_bad(read_file(path, tolerant=tolerant), "x", 0.001)))
        if not message:
            silent.append(name)
        assert not message or (name in message and "\n" not in message.strip()), (name, message)
    fault_row(
        f"dirty text, archives, Parquet ({'tolerant' if tolerant else 'strict'})",
        len(table),
        len(table) - len(silent),
        len(silent),
    )
    assert silent == []


def test_files_that_are_no_pairs(tmp_path, fault_row):
    for content, _ in NO_PAIRS:
        path = write(tmp_path, "a.json", content)
        rows = instructions.read_pairs("x", {"path": str(path)}, str, Counter())
        assert "a.json" in refusal(list, rows), content[:40]
    fault_row("files that are no pairs", len(NO_PAIRS), len(NO_PAIRS))


def test_typos_in_keys(fault_row):
    table = list(typos())
    right = sum(f"'{key}'" in nearest(typo, known) for typo, key, known in table)
    fault_row("one-letter typos over all known keys, answered with the right key", len(table), right)
    assert right == len(table)


def test_values_out_of_range(fault_row):
    """Every key of tiny with every value of the walk: refused with its file, or accepted; never an exception.

    A number that is not finite, or above every range, and accepted, would be silently wrong.
    """
    config, tried, silent = load_recipe("tiny"), 0, []
    for path in paths(config):
        for value in VALUES if len(path) > 1 else ():
            tried += 1
            message = refusal(check_recipe, changed(config, path, value), "configs/x")
            assert not message or (".json" in message and "\n" not in message), (path, value, message)
            if not message and isinstance(value, int | float) and not abs(value) <= 1e12:
                silent.append((path, value))
    fault_row("values out of range in tiny", tried, tried - len(silent), len(silent))
    assert silent == []


def test_broken_json(tmp_path, fault_row):
    """The files of tiny cut at many places, and JSON that is absurd."""
    whole = json.dumps(load_recipe("tiny")["pretrain"], indent=1)
    table = [text for text, _ in ABSURD] + [whole[:cut] for cut in range(0, len(whole) - 1, 3)]
    path = tmp_path / "pretrain.json"
    for text in table:
        path.write_text(text)
        with pytest.raises(Refused, match=r"pretrain\.json") as caught:
            keys.read_config(path)
        assert "\n" not in str(caught.value)
    fault_row("broken and absurd JSON", len(table), len(table))


def test_attacks_on_the_page(fault_row):
    through = [name for name, (path, headers, _) in ATTACKS.items() if answered(path, headers)[1]]
    fault_row(
        "requests of other sites, uploads, long requests to the page",
        len(ATTACKS),
        len(ATTACKS) - len(through),
        len(through),
    )
    assert through == []


def test_templates(monkeypatch, fault_row):
    monkeypatch.setattr(encode, "SECONDS", 0.3)
    fast = train_tokenizer(sentences(500, 1), {"vocab_size": 400}).tokenizer
    for template, _ in BAD_TEMPLATES:
        bad = with_template(fast, template)
        assert refusal(encode.check_template, bad).startswith("the chat template"), template
        if "**" not in template:
            assert refusal(encode.encode_conversation, bad, [QUESTION]), template
    fault_row("chat templates that hang, fail or escape", len(BAD_TEMPLATES), len(BAD_TEMPLATES))
