"""Generation: batches and streams give the same text; prompts are prepared as in training."""

import html
import itertools
import re
import threading

import pytest
from conftest import SHAPE, sentences
from recipe.evaluation import generation
from recipe.model.build import build_model
from recipe.project import Refused
from recipe.tokenization.encode_text import prompt_ids
from recipe.tokenization.train import train_tokenizer


@pytest.fixture(scope="module")
def fast():
    return train_tokenizer(sentences(2000, 1), {"vocab_size": 400}).tokenizer


@pytest.fixture(scope="module")
def model(fast):
    return build_model({"model_type": "qwen3", **SHAPE}, fast, "sdpa", 0)


def greedy(fast, **values):
    return generation.generation_config({"max_new_tokens": 12, "do_sample": False, **values}, fast)


PROMPTS = ["山", "今日、先生は学校で", "昨日", "猫は家で3回料理を作りました。"]


def test_batched_generation_is_that_of_single_prompts(fast, model):
    """Left padding and batches of two, sorted by length, do not change the answers."""
    prompts = [prompt_ids(fast, text) for text in PROMPTS]
    config = greedy(fast, repetition_penalty=1.2, no_repeat_ngram_size=2)
    together = generation.generate_all(model, fast, prompts, config, 0, batch_size=2)
    alone = [generation.generate_all(model, fast, [prompt], config, 0)[0] for prompt in prompts]
    assert together == alone
    assert len({answer.text for answer in together}) > 1
    streamed = ["".join(generation.stream(model, fast, prompt, config)) for prompt in prompts]
    assert streamed == [answer.text for answer in together]


def test_a_stream_with_several_beams_gives_the_whole_answer(fast, model):
    prompt, config = prompt_ids(fast, "山"), greedy(fast, num_beams=3)
    answer = generation.generate_all(model, fast, [prompt], config, 0)[0]
    assert list(generation.stream(model, fast, prompt, config)) == [answer.text] != [""]


def test_stop_strings_end_an_answer(fast, model, monkeypatch):
    """The answer ends with the token that completes the stop string."""
    prompt, config = prompt_ids(fast, "山"), greedy(fast, stop_strings=["。"])
    ids = prompt_ids(fast, "先生は学校で。犬は、今日は、")[1:]
    forced(model, ids, monkeypatch)
    assert "".join(generation.stream(model, fast, prompt, config)) == "先生は学校で。"
    forced(model, ids, monkeypatch)
    assert generation.generate_all(model, fast, [prompt], config, 0)[0].text == "先生は学校で。"


def test_the_seed_decides(fast, model):
    config = generation.generation_config({"max_new_tokens": 12, "do_sample": True}, fast)
    prompts = [prompt_ids(fast, "山")] * 5
    first, again, other = (generation.generate_all(model, fast, prompts, config, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) > 1  # several samples of one prompt differ


def forced(model, ids, monkeypatch):
    """Make a real model choose `ids` one after the other."""
    import torch

    forward = type(model).forward
    step = iter(ids)

    def choose(self, *arguments, **options):
        output = forward(self, *arguments, **options)
        output.logits = torch.full_like(output.logits, -1e4)
        output.logits[:, -1, next(step)] = 1e4
        return output

    monkeypatch.setattr(type(model), "forward", choose)


def test_a_stream_shows_kana_at_once_and_characters_whole(fast, model, monkeypatch):
    """𠮷 is four byte tokens here; a line of kana has no space to wait for."""
    text = "先生は家で本を読みました𠮷。"
    ids = fast(text, add_special_tokens=False)["input_ids"]
    whole = [i for i in ids if not fast.convert_ids_to_tokens(i).startswith("<0x")]
    assert len(ids) - len(whole) == 4 and len(whole) > 4
    forced(model, [*ids, fast.eos_token_id], monkeypatch)
    pieces = list(generation.stream(model, fast, prompt_ids(fast, "山"), greedy(fast, max_new_tokens=64)))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) == len(whole)


def test_an_error_in_generating_reaches_the_caller(fast, model, monkeypatch):
    forced(model, [5], monkeypatch)  # the second step finds nothing
    with pytest.raises(RuntimeError):
        list(generation.stream(model, fast, prompt_ids(fast, "山"), greedy(fast)))


def test_generation_stops_when_the_caller_closes_the_stream(fast, model):
    before = threading.active_count()
    pieces = generation.stream(
        model, fast, prompt_ids(fast, "山"), greedy(fast, max_new_tokens=200, min_new_tokens=200)
    )
    next(pieces)
    pieces.close()
    assert threading.active_count() == before


def test_the_first_space_of_a_continuation_is_kept():
    lines = ["the old man and the sea", "a man in the sea"] * 200
    fast = train_tokenizer(lines, {"vocab_size": 297, "kind": "unigram"}).tokenizer
    prompt, whole = fast("the old")["input_ids"], fast("the old man")["input_ids"]
    assert whole[: len(prompt)] == prompt
    assert generation.decode_continuation(fast, prompt, whole[len(prompt) :]) == " man"


@pytest.mark.extra("sudachi")
def test_input_is_normalised_and_segmented_and_output_joined():
    """Full-width letters become half-width; only the model sees spaces between words."""
    from recipe.project import DATA
    from recipe.tokenization.word_segmenter import make_segmenter

    segment = make_segmenter("sudachi", DATA).segment
    fast = train_tokenizer(
        segment(sentences(500, 1)), {"kind": "word-bpe", "vocab_size": 100, "segmenter": "sudachi"}
    ).tokenizer
    clean = generation.clean_prompt({"dataset": {}}, "今日、先生は  Ｌｉｎｕｘを")
    assert clean == "今日、先生はLinuxを"
    ids = prompt_ids(fast, clean)
    assert ids == fast("今日 、 先生 は Linux を")["input_ids"]
    assert generation.decode_continuation(fast, ids[:1], ids[1:]) == clean


def test_a_prompt_that_does_not_fit_is_named(fast, model):
    with pytest.raises(Refused, match=r"10 tokens; the model has 256 positions, .*: 4 are left"):
        generation.generate_all(model, fast, [[5], [5] * 10], greedy(fast, max_new_tokens=252), 0)
    with pytest.raises(Refused, match="no token"):
        generation.generate_all(model, fast, [[]], greedy(fast), 0)
    with pytest.raises(Refused, match="empty after normalising"):
        generation.clean_prompt({"dataset": {}}, " \n")
    with pytest.raises(Refused, match="empty after normalising"):
        generation.clean_question({"dataset": {}}, " \n")


def test_a_question_keeps_its_layout_and_the_beginning_of_a_document_is_prose():
    text = "\n  - ﾔﾏ の 高さ\n\n    x = 1\n"
    assert generation.clean_question({"dataset": {}}, text) == "  - ヤマ の 高さ\n\n    x = 1"
    assert generation.clean_prompt({"dataset": {}}, text) == "-ヤマの高さ\nx = 1"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 0}, "do_sample to false"),
        ({"top_p": 2.0}, "top_p"),
        ({"repetition_penalty": -1.0}, "penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_values_out_of_range_are_refused(fast, values, message):
    with pytest.raises(Refused, match=message):
        generation.generation_config({"max_new_tokens": 4, "do_sample": True} | values, fast)


@pytest.mark.parametrize(("given", "expected"), [({}, None), ({"top_k": None}, 0), ({"top_k": 3}, 3)])
def test_null_top_k_leaves_out_no_token(fast, given, expected):
    """None in GenerationConfig is transformers' default, 50."""
    values = {"max_new_tokens": 4, "do_sample": True} | given
    assert generation.generation_config(values, fast).top_k == expected


def test_another_special_id_than_the_tokenizers_is_refused(fast):
    values = {"max_new_tokens": 4, "eos_token_id": fast.eos_token_id}
    assert generation.generation_config(values, fast).eos_token_id == fast.eos_token_id
    with pytest.raises(Refused, match=f"eos_token_id: 7, but the tokenizer has {fast.eos_token_id}"):
        generation.generation_config(values | {"eos_token_id": 7}, fast)


def test_whole_numbers_are_numbers(fast):
    values = {"max_new_tokens": 4, "do_sample": True, "temperature": 1, "top_p": 1, "repetition_penalty": 1}
    assert generation.generation_config(values, fast).temperature == 1.0


@pytest.mark.parametrize(("rows", "most"), [(63, 32), (95, 32), (9, 5), (5, 5), (3, 5), (0, 5)])
def test_evenly_reaches_the_last_rows(rows, most):
    chosen = generation.evenly(range(rows), most)
    assert len(chosen) == min(rows, most) and chosen == sorted(set(chosen))
    assert rows == 0 or max(b - a for a, b in itertools.pairwise([*chosen, rows])) <= -(-rows // most)


def test_side_by_side_is_a_table_that_shows_what_was_written():
    from markdown_it import MarkdownIt

    rows = [{"prompt": "# 山|*a*", "before": ["a\nb", "<b>`c`"], "after": "[d](e) \\f"}]
    page = MarkdownIt("commonmark").enable("table").render(generation.side_by_side(rows))
    cells = re.findall("<td>(.*?)</td>", page)
    assert [html.unescape(cell) for cell in cells] == ["# 山|*a*", "a b<br><b>`c`", "[d](e) \\f"]
