"""The chat template: real line ends, one <s>, answers trained up to </s>, the same bytes everywhere."""

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import sentences
from recipe.config import chat_templates as forms
from recipe.conversations import encode
from recipe.project import RecipeError
from recipe.tokenization.train import train_tokenizer
from transformers import PreTrainedTokenizerFast

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
@pytest.mark.parametrize(
    "blocks", [False, True], ids=["jinja2's defaults", "as transformers and vLLM set it"]
)
def test_any_jinja_renders_the_saved_file_as_the_training_form(fast, form, blocks, tmp_path):
    """A server that reads chat_template.jinja and has no extensions of transformers."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    fast = with_template(fast, forms.chat_template(form, SYSTEM))
    fast.save_pretrained(tmp_path)
    jinja = ImmutableSandboxedEnvironment(trim_blocks=blocks, lstrip_blocks=blocks)
    template = jinja.from_string((tmp_path / "chat_template.jinja").read_text("utf-8"))
    conversation = [QUESTION, ANSWER, {"role": "user", "content": forms.user_message(" 訳せ\n", "山")}]
    text = template.render(
        messages=conversation, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert text == fast.apply_chat_template(conversation, tokenize=False)
    ids, _ = encode.encode_conversation(fast, conversation)
    assert fast.decode(ids) == text


@pytest.mark.parametrize("form", forms.FORMS)
def test_our_templates_can_be_trained(fast, form):
    encode.check_template(with_template(fast, forms.chat_template(form, SYSTEM)))


TURN = (
    "{% for m in messages %}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% else %}:{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template: this model was not tuned"),
        (TURN.replace(":", ""), "has no response mark: after a question, which ends with '山は高いか'"),
        (
            TURN.replace("{{ eos_token }}", ""),
            "writes the answer 'はい、高い' as 'はい、高い'; expected: the answer, then '</s>'",
        ),
        (TURN + "{{ messages|length }}", "renders '山は高いか:1' differently when 'はい、高い' follows"),
        (TURN + "{% endfor %}", "cannot be rendered: .*endfor"),
    ],
    ids=["none", "no response mark", "no end token", "not the same again", "not Jinja"],
)
def test_a_template_that_cannot_train_answers_is_refused(fast, template, message):
    assert encode.check_template(with_template(fast, TURN)) is None
    with pytest.raises(RecipeError, match=rf"{message}.*recipe/config/chat_templates\.py"):
        encode.check_template(with_template(fast, template))


def with_template(fast, template):
    """A copy of the tokenizer with another chat template."""
    other = copy.deepcopy(fast)
    other.chat_template = template
    return other


def test_a_tokenizer_without_special_tokens_is_refused(fast):
    bare = PreTrainedTokenizerFast(tokenizer_object=fast.backend_tokenizer)
    bare.chat_template = TURN
    with pytest.raises(RecipeError, match=r"no eos_token and no pad_token.*stage 03.*tokenizer_config\.json"):
        encode.check_template(bare)


@pytest.mark.parametrize("form", forms.FORMS)
def test_servers_find_the_answer_in_what_was_generated(fast, form, tmp_path):
    """With response_template, transformers' servers remove the prompt and the end token; saved and loaded."""
    from transformers import AutoTokenizer

    fast = with_template(fast, forms.chat_template(form, SYSTEM))
    fast.response_template = forms.response_template(form, fast.eos_token)
    fast.save_pretrained(tmp_path)
    served = AutoTokenizer.from_pretrained(tmp_path)
    conversation = [QUESTION, ANSWER, QUESTION]
    prompt, _ = encode.encode_conversation(served, conversation)
    whole, _ = encode.encode_conversation(served, [*conversation, ANSWER])
    parsed = served.parse_response(whole[len(prompt) :], prefix=served.decode(prompt))
    assert parsed == ANSWER


@pytest.mark.parametrize("form", forms.FORMS)
def test_servers_send_the_training_form(fast, form, tmp_path):
    """Also with add_generation_prompt, which chat commands and servers set; saved and loaded."""
    from transformers import AutoTokenizer

    fast.save_pretrained(tmp_path / "plain")
    fast = AutoTokenizer.from_pretrained(tmp_path / "plain")
    fast.chat_template = forms.chat_template(form, SYSTEM)
    fast.save_pretrained(tmp_path / "served")
    served = AutoTokenizer.from_pretrained(tmp_path / "served")
    conversation = [QUESTION, ANSWER, {"role": "user", "content": forms.user_message(" 訳せ\n", "山")}]
    prompt = served.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)
    trained, _ = encode.encode_conversation(fast, [*conversation, ANSWER])
    answer, _ = encode.encode_conversation(fast, conversation)
    assert prompt["input_ids"] == answer == trained[: len(answer)]
    assert len(trained) > len(answer)


def test_ids_are_those_of_apply_chat_template_and_answers_are_trained(fast):
    ids, trained = encode.encode_conversation(fast, [QUESTION, ANSWER, QUESTION, ANSWER])
    # The marks of transformers for what is trained, which the saved template must not contain.
    marked = fast.chat_template.replace(
        "{{- content + eos_token -}}",
        "{%- generation -%}{{- content + eos_token -}}{%- endgeneration -%}",
    )
    direct = fast.apply_chat_template(
        [QUESTION, ANSWER, QUESTION, ANSWER],
        chat_template=marked,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert ids == direct["input_ids"]
    assert [int(flag) for flag in trained] == direct["assistant_masks"]
    assert ids.count(2) == 1 and ids[0] == 2
    learned = [i for i, flag in zip(ids, trained, strict=True) if flag]
    assert fast.decode(learned) == "山に登りました。</s>山に登りました。</s>"


def test_prompt_is_the_beginning_of_the_training_form(fast):
    prompt, _ = encode.encode_conversation(fast, [QUESTION])
    whole, trained = encode.encode_conversation(fast, [QUESTION, ANSWER])
    assert whole[: len(prompt)] == prompt
    assert trained.index(True) == len(prompt)


def test_special_strings_in_messages_are_text(fast):
    ids, trained = encode.encode_conversation(
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
    shown = encode.preview([encode.encode_conversation(fast, [QUESTION, ANSWER, QUESTION, ANSWER])], fast)
    assert shown.count("### 応答:\n【山に登りました。</s>】") == 2


@pytest.mark.parametrize("form", forms.FORMS)
def test_the_layout_of_messages_is_trained_and_asked_exactly(fast, form):
    """Code that begins with indentation, empty lines and lists, through the template and the tokenizer."""
    fast = with_template(fast, forms.chat_template(form))
    code, lists = "    for i in n:\n\n\tprint(i)", "- 親の項目\n  - 子の項目\n\n　字下げ"
    question, answer = ({"role": "user", "content": code}, {"role": "assistant", "content": code + lists})
    ids, trained = encode.encode_conversation(fast, [question, answer, question | {"content": lists}])
    learned = [i for i, flag in zip(ids, trained, strict=True) if flag]
    assert fast.decode(learned) == f"{code}{lists}</s>"
    assert f"\n{code}\n\n" in fast.decode(ids) and f"\n{lists}\n\n" in fast.decode(ids)


def test_empty_lines_at_the_beginning_and_white_space_at_the_end_are_removed(fast):
    """As stage 11 does; a server may send them."""
    message = {"role": "user", "content": f"\n\n  {QUESTION['content']} \n"}
    expected = {"role": "user", "content": f"  {QUESTION['content']}"}
    assert fast.apply_chat_template([message], tokenize=False) == fast.apply_chat_template(
        [expected], tokenize=False
    )


BAD_TEMPLATES = [
    (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "than 0.3 seconds",
    ),
    ("{{ 10 ** 10 ** 9 }}", "computes a power"),
    ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ("{{ messages[9].content.x.y }}", "UndefinedError"),
    ("{{ raise_exception('no') }}", "TemplateError: no"),
    ("{{ 'a' * 99999999999999 }}", "MemoryError"),
    ("{{ range(999999999) }}", "OverflowError"),
    ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{% for %}", "TemplateSyntaxError"),
    ("{{ messages | nothing }}", "TemplateAssertionError"),
    ("{{ messages[0].content + 1 }}", "TypeError"),
    ("{{ messages[0]['content'].encode('ascii') }}", "UnicodeEncodeError"),
]


@pytest.mark.parametrize(("template", "reason"), BAD_TEMPLATES)
def test_a_template_that_hangs_or_fails_is_named(fast, template, reason, monkeypatch):
    """In a thread of the page, too: a signal would work in the main thread only."""
    if "0.3 seconds" in reason:  # on a busy machine the others may need as long
        monkeypatch.setattr(encode, "SECONDS", 0.3)
    bad = with_template(fast, template)
    with pytest.raises(RecipeError, match="the chat template") as caught:
        encode.check_template(bad)
    assert reason in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
    if "power" not in reason:
        with ThreadPoolExecutor(1) as threads, pytest.raises(RecipeError, match="the chat template"):
            threads.submit(encode.encode_conversation, bad, [QUESTION]).result()


def test_a_time_limit_that_is_not_reached_does_nothing():
    """Neither while it runs nor later, and one thread watches all of them."""
    before = threading.active_count()
    for _ in range(100):
        with encode.time_limit(0.3):
            pass
    assert not encode._ends and threading.active_count() <= before + 1
    for _ in range(50):
        time.sleep(0.01)
