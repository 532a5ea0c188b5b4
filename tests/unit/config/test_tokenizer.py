"""The keys of tokenizer.json, and what follows from them before stage 03 has run."""

import pytest
from recipe.config import tokenizer
from recipe.config.recipe import check_recipe
from recipe.project import Refused
from refusal import refusal, tiny


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["tokenizer"].pop("vocab_size"), ["tokenizer.json: vocab_size: missing"]),
        (lambda c: c["tokenizer"].update(kind="byte-level"), ["kind: unknown", "'byte-level-bpe'"]),
        (lambda c: c["tokenizer"].update(kind="published"), ["vocab_size: unknown key"]),
        (lambda c: c["tokenizer"].update(kind="word-bpe"), ["character_coverage: unknown key"]),
        (lambda c: c["tokenizer"].update(unk_token=None), ["unk_token: null"]),
        (lambda c: c["tokenizer"].update(bos_token="x"), ["bos_token", "two characters"]),
        (lambda c: c["tokenizer"].update(bos_token="</s>"), ['"</s>"', "twice"]),
        (lambda c: c["tokenizer"].update(user_symbols=["語", "語"]), ['"語"', "twice"]),
        (lambda c: c["tokenizer"].update(user_symbols=["語", "a"]), ['user_symbols: "a"', "Remove it"]),
        (lambda c: c["tokenizer"].update(pad_token_id=3), ["[3, 1, 2, 3]", "[0, 1, 2, 3]"]),
        (lambda c: c["tokenizer"].update(pad_token=None, pad_token_id=0), ["pad_token is null"]),
        (lambda c: c["tokenizer"].update(kind=["bpe"]), ['kind: unknown ["bpe"]']),
    ],
)
def test_a_fault_is_named_with_the_way_out(change, words):
    message = refusal(change)
    assert all(word in message for word in words), message


def test_special_ids_follow_the_tokens_that_are_there():
    assert tokenizer.special_ids({}) == {
        f"{name}_token_id": i for i, name in enumerate(("pad", "unk", "bos", "eos"))
    }
    words = {"kind": "word-bpe", "pad_token": None}
    assert tokenizer.special_ids(words) == {
        "pad_token_id": 2,
        "unk_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert tokenizer.special_ids({"kind": "published", "published": "x"}) == {}


def test_vocabulary_is_rounded_up():
    values = tiny()
    values["tokenizer"].update(vocab_size=8001, round_to=64)
    values["model"]["vocab_size"] = 8064
    check_recipe(values, "configs/x")
    values["model"]["vocab_size"] = 8001
    with pytest.raises(Refused, match="tokenizer.json has 8064"):
        check_recipe(values, "configs/x")
