"""The instruction format: real line ends, one <s>, answers trained to </s>, the same bytes in every place."""

import pytest
from conftest import sentences
from recipe import chat
from recipe import templates as forms
from recipe.conversations import preview
from recipe.tokenizer_training import train_tokenizer

SYSTEM = 'あなたは"AI"です。'


@pytest.fixture(scope="module")
def fast():
    fast = train_tokenizer(sentences(2000, 1), {"vocab_size": 400}).tokenizer
    fast.chat_template = forms.chat_template("alpaca", SYSTEM)
    return fast


QUESTION = {"role": "user", "content": "山は?"}
ANSWER = {"role": "assistant", "content": "山に登りました。"}


ALONE = "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。\n\n"
WITH_INPUT = (
    "以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。要求を適切に満たす応答を書きなさい。\n\n"
)


def test_alpaca_byte_for_byte(fast):
    text = fast.apply_chat_template([QUESTION, ANSWER, QUESTION], tokenize=False)
    assert text == (
        f"<s>{SYSTEM}\n\n{ALONE}### 指示:\n山は?\n\n### 応答:\n山に登りました。</s>"
        "\n\n### 指示:\n山は?\n\n### 応答:\n"
    )
    given = forms.user_message("訳せ", "山")
    text = fast.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": given}], tokenize=False
    )
    assert text == f"<s>S\n\n{WITH_INPUT}### 指示:\n訳せ\n\n### 入力:\n山\n\n### 応答:\n"


def test_plain_chat_byte_for_byte(fast):
    text = fast.apply_chat_template(
        [QUESTION, ANSWER, QUESTION], tokenize=False, chat_template=forms.chat_template("chat")
    )
    assert text == ("<s>User:\n山は?\n\nAssistant:\n山に登りました。</s>\n\nUser:\n山は?\n\nAssistant:\n")


@pytest.mark.parametrize("form", forms.FORMS)
def test_what_servers_send_is_the_training_form(fast, form, tmp_path):
    """Saved and loaded, with the generation prompt that chat commands and servers ask for."""
    from transformers import AutoTokenizer

    fast.save_pretrained(tmp_path / "plain")
    fast = AutoTokenizer.from_pretrained(tmp_path / "plain")
    fast.chat_template = forms.chat_template(form, SYSTEM)
    fast.save_pretrained(tmp_path / "served")
    served = AutoTokenizer.from_pretrained(tmp_path / "served")
    conversation = [QUESTION, ANSWER, {"role": "user", "content": forms.user_message(" 訳せ\n", "山")}]
    prompt = served.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)
    trained, _ = chat.encode_conversation(fast, [*conversation, ANSWER])
    answer, _ = chat.encode_conversation(fast, conversation)
    assert prompt["input_ids"] == answer == trained[: len(answer)]
    assert len(trained) > len(answer)


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
    shown = preview([chat.encode_conversation(fast, [QUESTION, ANSWER, QUESTION, ANSWER])], fast)
    assert shown.count("### 応答:\n【山に登りました。</s>】") == 2
