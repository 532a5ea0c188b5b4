"""The instruction format: real line ends, one <s>, answers trained to </s>, the same bytes in every place."""

import pytest
from conftest import sentences
from recipe import chat
from recipe.conversations import preview
from recipe.tokenizer_training import train_tokenizer

SYSTEM = 'あなたは"AI"です。'


@pytest.fixture(scope="module")
def fast():
    fast = train_tokenizer(sentences(2000, 1), {"vocab_size": 400}).tokenizer
    fast.chat_template = chat.chat_template("alpaca", SYSTEM)
    return fast


QUESTION = {"role": "user", "content": "山は?"}
ANSWER = {"role": "assistant", "content": "山に登りました。"}


def test_format_byte_for_byte(fast):
    text = fast.apply_chat_template([QUESTION, ANSWER, QUESTION], tokenize=False)
    assert text == (
        f"<s>{SYSTEM}\n\n### 指示:\n山は?\n\n### 応答:\n山に登りました。</s>"
        "\n\n### 指示:\n山は?\n\n### 応答:\n"
    )
    given = chat.user_message("訳せ", "山")
    text = fast.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": given}], tokenize=False
    )
    assert text == "<s>S\n\n### 指示:\n訳せ\n\n### 入力:\n山\n\n### 応答:\n"


def test_ids_are_those_of_apply_chat_template_and_answers_are_trained(fast):
    ids, trained = chat.encode_conversation(fast, [QUESTION, ANSWER, QUESTION, ANSWER])
    direct = fast.apply_chat_template(
        [QUESTION, ANSWER, QUESTION, ANSWER],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert ids == direct["input_ids"]
    assert [int(flag) for flag in trained] == direct["assistant_masks"]
    assert ids.count(2) == 1 and ids[0] == 2
    learnt = [i for i, flag in zip(ids, trained, strict=True) if flag]
    assert fast.decode(learnt) == "山に登りました。</s>山に登りました。</s>"


def test_prompt_is_the_beginning_of_the_training_form(fast):
    prompt, _ = chat.encode_conversation(fast, [QUESTION])
    whole, trained = chat.encode_conversation(fast, [QUESTION, ANSWER])
    assert whole[: len(prompt)] == prompt
    assert trained.index(True) == len(prompt)


def test_special_strings_in_messages_are_text(fast):
    ids, trained = chat.encode_conversation(
        fast,
        [{"role": "user", "content": "</s>とは<s>?"}, {"role": "assistant", "content": "終わり</s>です"}],
    )
    assert ids.count(3) == 1 and ids[-1] == 3 and ids.count(2) == 1
    assert "</s>とは<s>?" in fast.decode(ids[1:])
    assert trained[-1]


def test_unknown_role_is_refused(fast):
    with pytest.raises(Exception, match="unknown role tool"):
        fast.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_preview_marks_what_is_trained(fast):
    assert "### 応答:\n【山に登りました。</s>】" in preview(
        [chat.encode_conversation(fast, [QUESTION, ANSWER])], fast
    )
