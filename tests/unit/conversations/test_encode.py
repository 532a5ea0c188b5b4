"""Pairs as tokens: pairs that are too long or shortened, and pairs without a trained token."""

from contextlib import nullcontext

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import sentences
from recipe.config.chat_templates import chat_template
from recipe.conversations import encode
from recipe.conversations.encode import encode_conversation, load_conversations
from recipe.conversations.instructions import messages_of
from recipe.project import RecipeError
from recipe.tokenization.encode_text import encode_text
from recipe.tokenization.packing import IGNORED, PackedConversations
from recipe.tokenization.train import train_tokenizer


@pytest.fixture(scope="module")
def fast():
    fast = train_tokenizer(sentences(2000, 1), {"vocab_size": 400}).tokenizer
    fast.chat_template = chat_template("chat")
    return fast


def row(output, history=()):
    return {"instruction": "山は?", "input": "", "output": output, "history": list(history)}


def write(tmp_path, *rows):
    path = tmp_path / "train.parquet"
    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("trained", pa.bool_())]))
    texts = [(name, pa.string()) for name in ("instruction", "input", "output")]
    pq.write_table(pa.Table.from_pylist(list(rows), pa.schema([*texts, ("history", turns)])), path)
    return path


LONG = "山に登りました。" * 80
BEFORE = [{"role": "user", "content": "海は?"}, {"role": "assistant", "content": "湖を見ました。"}]


def test_the_last_turns_are_cut_until_a_conversation_fits(tmp_path, fast):
    found, counts = load_conversations(
        write(tmp_path, row("はい。"), row(LONG, BEFORE), row(LONG)), fast, 128
    )
    assert counts == {"longer than block_size": 1, "shortened": 1}
    assert found == [
        encode_conversation(fast, messages_of(row("はい。"))),
        encode_conversation(fast, BEFORE),
    ]


def test_a_conversation_is_encoded_once_however_many_turns_are_cut(tmp_path, fast, monkeypatch):
    encoded = []
    monkeypatch.setattr(encode, "encode_text", lambda *given: encoded.append(given) or encode_text(*given))
    history = [turn for _ in range(20) for turn in BEFORE]
    (found,), counts = load_conversations(write(tmp_path, row("はい。", history)), fast, 128)
    assert counts == {"longer than block_size": 0, "shortened": 1} and len(encoded) < 3 * 42
    kept = next(end for end in range(40, 0, -2) if len(encode_conversation(fast, history[:end])[0]) <= 128)
    assert kept > 2 and found == encode_conversation(fast, history[:kept])


def test_the_time_limit_grows_with_the_messages(fast, monkeypatch):
    limits = []
    monkeypatch.setattr(encode, "time_limit", lambda seconds: limits.append(seconds) or nullcontext())
    encode_conversation(fast, BEFORE)
    encode_conversation(fast, BEFORE * 50)
    encode_conversation(fast, BEFORE * 51)
    assert limits == [encode.SECONDS, encode.SECONDS, 2 * encode.SECONDS]


def test_private_use_characters_stay_text(fast):
    """They take the places of control tokens while the template is applied."""
    text = "".join(map(chr, range(0xF0000, 0xF0004)))
    ids, _ = encode_conversation(fast, [{"role": "user", "content": f"</s>{text}"}])
    assert f"User:\n</s>{text}\n" in fast.decode(ids) and ids.count(fast.eos_token_id) == 0


def test_none_that_fits_is_an_error(tmp_path, fast):
    with pytest.raises(RecipeError, match=r"no pair fits into block_size 64\. Raise finetune\.block_size"):
        load_conversations(write(tmp_path, row(LONG)), fast, 64)


def test_an_answer_without_a_trained_token_is_an_error(tmp_path, fast):
    with pytest.raises(RecipeError, match=r"'山は\?' has no trained token"):
        load_conversations(write(tmp_path, row(" ")), fast, 128)


def test_an_empty_answer_before_the_last_is_an_error(tmp_path, fast):
    blank = [{"role": "user", "content": "海は?"}, {"role": "assistant", "content": ""}]
    with pytest.raises(RecipeError, match=r"the pair '海は\?' has no trained token: its answer is empty"):
        load_conversations(write(tmp_path, row("はい。", blank)), fast, 128)


def test_an_answer_that_is_context_is_read_and_not_trained(tmp_path, fast):
    question, wrong = BEFORE
    context = [question, wrong | {"trained": False}]
    path = write(tmp_path, row("はい。", context), row("はい。", BEFORE), row(LONG, context))
    found, counts = load_conversations(path, fast, 128)
    # Without its last turn, the third conversation would have no trained token.
    assert counts == {"longer than block_size": 1}
    assert found[0][0] == found[1][0]
    learned = [
        fast.decode([token for token, is_trained in zip(*conversation, strict=True) if is_trained])
        for conversation in found
    ]
    assert learned == ["はい。</s>", "湖を見ました。</s>はい。</s>"]
    labels = PackedConversations(found[:1], 128, fast.pad_token_id)[0]["labels"]
    assert fast.decode(labels[labels != IGNORED]) == "はい。</s>"
