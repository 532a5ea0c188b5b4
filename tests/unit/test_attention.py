"""Attention by documents: what it computes is what masked attention computes, forward and backward."""

import pytest
import torch
from conftest import SHAPE, sentences
from recipe import generation
from recipe.attention import KEYS, QUERIES, _visible, attend, chunks, document_attention
from recipe.modeling import build_model
from recipe.tokenizer import prompt_ids
from recipe.tokenizer_training import train_tokenizer
from transformers.models.llama.modeling_llama import eager_attention_forward

# Documents shorter and longer than a chunk, of one token, and one that fills its row.
LENGTHS = [[1, QUERIES + 70, 30, 2 * QUERIES - 101], [3 * QUERIES]]
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
PLACES = POSITIONS.shape[1]


def inputs(heads, groups, dtype):
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, PLACES, count, 16) for count in (heads, groups, groups)]
    return [
        torch.randn(shape, generator=generator).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes
    ]


def masked(query, key, value, scale):
    """The definition: every pair of places, those of other documents and those behind hidden."""
    document = (POSITIONS == 0).cumsum(-1)
    visible = (document[:, None, :, None] == document[:, None, None, :]).tril()
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = (query * scale) @ key.transpose(2, 3)
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ value


def seen(position_ids):
    """By query, the keys that it sees, from the chunks; every query must come once."""
    found = {}
    for row, first, here, end, hidden in chunks(position_ids):
        assert hidden.shape == (end - here, end - first)
        for query, keys in zip(range(here, end), ~hidden, strict=True):
            assert (row, query) not in found
            found[row, query] = (keys.nonzero().flatten() + first).tolist()
    return found


def test_a_query_sees_its_document_up_to_itself():
    found = seen(POSITIONS)
    assert len(found) == 2 * PLACES
    for (row, query), keys in found.items():
        assert keys == list(range(query - int(POSITIONS[row, query]), query + 1))


def test_a_row_that_begins_inside_a_document_is_read_from_its_beginning():
    assert list(seen(torch.tensor([[4, 5, 0, 1]])).values()) == [[0], [0, 1], [2], [2, 3]]


def test_few_shapes_whatever_the_documents():
    """Each shape of matrices has kernels of its own, which are kept: memory would grow with every batch."""
    generator = torch.Generator().manual_seed(0)
    shapes = set()
    for _ in range(50):
        starts = torch.rand(512, generator=generator) < 0.01
        places = torch.arange(512)
        positions = places - torch.where(starts, places, 0).cummax(0).values
        shapes |= {hidden.shape for *_, hidden in chunks(positions[None])}
    assert len(shapes) <= 512 // KEYS


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
def test_values_and_gradients_are_those_of_the_definition(heads, groups):
    given = inputs(heads, groups, torch.float64)
    wanted = masked(*given, scale=1.0)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = torch.autograd.grad((wanted * weights).sum(), given)
    found = document_attention(*given, POSITIONS)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    ours = torch.autograd.grad((found * weights).sum(), given)
    torch.testing.assert_close(ours, gradients, rtol=1e-10, atol=1e-11)


def test_torch_compile_is_told_the_truth():
    given = inputs(4, 2, torch.float32)
    torch.library.opcheck(document_attention, (*given, POSITIONS))


def test_bf16_is_as_near_to_the_truth_as_transformers_eager_attention():
    """Scores are rounded to bf16 before the softmax, as there; PyTorch's fused kernel keeps them in
    float32.
    """
    given = [x.detach() for x in inputs(4, 2, torch.bfloat16)]
    exact = masked(*(x.double() for x in given), scale=0.25).transpose(1, 2)
    module = torch.nn.Module().eval()
    module.num_key_value_groups = 2
    hidden = torch.zeros(1).masked_fill(~_visible(POSITIONS), float("-inf")).to(torch.bfloat16)
    ours, _ = attend(module, *given, None, scaling=0.25, position_ids=POSITIONS)
    eager, _ = eager_attention_forward(module, *given, hidden, scaling=0.25)
    errors = [((out - exact).norm() / exact.norm()).item() for out in (ours, eager)]
    assert 1e-4 < errors[0] < 1.05 * errors[1], errors


def test_with_dropout_documents_stay_apart():
    """Dropout goes to PyTorch's kernel, which takes documents apart only by a mask."""
    query, key, value = inputs(4, 4, torch.float32)
    torch.manual_seed(0)
    before, _ = attend(torch.nn.Module(), query, key, value, None, dropout=0.5, position_ids=POSITIONS)
    other = value.detach().clone()
    other[0, :, 1 : QUERIES + 71] += 1  # the second document
    torch.manual_seed(0)
    after, _ = attend(torch.nn.Module(), query, key, other, None, dropout=0.5, position_ids=POSITIONS)
    assert torch.equal(before[0, QUERIES + 71 :], after[0, QUERIES + 71 :])
    assert not torch.equal(before[0, 1 : QUERIES + 71], after[0, 1 : QUERIES + 71])
    plain, _ = attend(torch.nn.Module(), query, key, value, None, position_ids=POSITIONS)
    assert not torch.allclose(plain, before)


def test_a_model_that_trains_with_it_generates_as_with_pytorchs_own():
    """Samples during training come from this very model: padded prompts and a cache."""
    fast = train_tokenizer(sentences(2000, 1), {"vocab_size": 400}).tokenizer
    prompts = [prompt_ids(fast, text) for text in ("山", "今日、先生は学校で")]
    config = generation.generation_config({"max_new_tokens": 12, "do_sample": False}, fast)
    answers = []
    for attention in ("documents", "sdpa"):
        model = build_model({"model_type": "qwen3", **SHAPE}, fast, attention, 0)
        answers.append(generation.generate_all(model, fast, prompts, config, 0, batch_size=2))
    assert answers[0] == answers[1]
