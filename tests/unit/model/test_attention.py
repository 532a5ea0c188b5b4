"""Attention by documents: what it computes is what masked attention computes, forward and backward."""

import numpy as np
import pytest
import torch
from conftest import EXPERTS, SHAPE, sentences
from recipe.config.known_keys import MODEL_TYPES
from recipe.evaluation import generation
from recipe.model import attention
from recipe.model.attention import KEYS, QUERIES, ROWS, attend, chunks, document_attention
from recipe.model.build import build_model
from recipe.tokenization.encode_text import prompt_ids
from recipe.tokenization.packing import pack
from recipe.tokenization.train import train_tokenizer
from transformers.models.llama.modeling_llama import eager_attention_forward

# Documents shorter and longer than a chunk, of one token, and some that fill their row. One row more than are
# computed together.
FIRST = [1, QUERIES + 70, 30, 2 * QUERIES - 101]
LENGTHS = [FIRST, *[[3 * QUERIES]] * (ROWS - 1), FIRST[::-1]]
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
PLACES = POSITIONS.shape[1]


DOCUMENTS = (POSITIONS == 0).cumsum(-1)
VISIBLE = (DOCUMENTS[:, None, :, None] == DOCUMENTS[:, None, None, :]).tril()


def hidden(dtype):
    """What `recipe.model.attention.mask` makes for these blocks."""
    return torch.zeros(1, dtype=dtype).masked_fill(~VISIBLE, float("-inf"))


def inputs(heads, groups, dtype):
    """Queries, keys and values: [rows, heads or groups, positions, size]."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(len(LENGTHS), count, PLACES, 16) for count in (heads, groups, groups)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def grouped(query, groups):
    """[rows, heads, positions, size] as `document_attention` takes queries."""
    return query.unflatten(1, (groups, -1)).transpose(2, 3).contiguous()


def masked(query, key, value, scale):
    """The definition: every pair of positions, those of other documents and those behind hidden."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = (query * scale) @ key.transpose(2, 3)
    return scores.masked_fill(~VISIBLE, float("-inf")).softmax(-1) @ value


def test_chunks_hold_every_query_once_and_all_keys_that_it_sees():
    found = torch.zeros_like(POSITIONS)
    for rows, queries, keys in chunks(POSITIONS):
        found[rows, queries] += 1
        assert keys.stop == queries.stop and keys.start % KEYS == 0
        assert not VISIBLE[rows, 0, queries, : keys.start].any()
    assert (found == 1).all()


def test_chunks_read_little_that_no_query_sees():
    """The last chunk of the first row begins in a document from 229 on: its keys begin at 192. Together with
    rows of one document, they begin at 0.
    """
    ends = [(0, 128), (0, 256), (192, 384)]
    assert [(keys.start, keys.stop) for *_, keys in chunks(POSITIONS[:1])] == ends
    together = [(rows, keys.start) for rows, _, keys in chunks(POSITIONS)][:3]
    assert together == [(slice(0, ROWS), 0)] * 3


def test_a_row_that_begins_inside_a_document_is_read_from_its_beginning():
    inside = torch.arange(400, 400 + 2 * QUERIES)[None]
    assert [keys.start for *_, keys in chunks(inside)] == [0, 0]


def test_few_shapes_whatever_the_documents():
    """Each shape of matrices has kernels of its own, which are kept: memory would grow with every batch."""
    generator = torch.Generator().manual_seed(0)
    shapes = set()
    for _ in range(50):
        starts = torch.rand(512, generator=generator) < 0.01
        positions = torch.arange(512)
        positions = positions - torch.where(starts, positions, 0).cummax(0).values
        shapes |= {keys.stop - keys.start for *_, keys in chunks(positions[None])}
    assert len(shapes) <= 512 // KEYS


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
def test_values_and_gradients_are_those_of_the_definition(heads, groups):
    given = inputs(heads, groups, torch.float64)
    expected = masked(*given, scale=1.0)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = torch.autograd.grad((expected * weights).sum(), given)
    query, key, value = given
    found = document_attention(grouped(query, groups), key, value, hidden(torch.float64), POSITIONS)
    found = found.transpose(2, 3).flatten(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    ours = torch.autograd.grad((found * weights).sum(), given)
    torch.testing.assert_close(ours, gradients, rtol=1e-10, atol=1e-11)


def test_torch_compile_is_told_the_truth():
    query, key, value = inputs(4, 2, torch.float32)
    query = grouped(query, 2).detach().requires_grad_()
    torch.library.opcheck(document_attention, (query, key, value, hidden(torch.float32), POSITIONS))


def test_bf16_is_as_near_to_the_truth_as_transformers_eager_attention():
    """Scores are rounded to bf16 before the softmax, as there; PyTorch's fused kernel keeps them in
    float32.
    """
    given = [x.detach() for x in inputs(4, 2, torch.bfloat16)]
    exact = masked(*(x.double() for x in given), scale=0.25).transpose(1, 2)
    module = torch.nn.Module().eval()
    module.num_key_value_groups = 2
    mask = hidden(torch.bfloat16)
    ours, _ = attend(module, *given, mask, scaling=0.25, position_ids=POSITIONS)
    eager, _ = eager_attention_forward(module, *given, mask, scaling=0.25)
    errors = [((out - exact).norm() / exact.norm()).item() for out in (ours, eager)]
    assert 1e-4 < errors[0] < 1.05 * errors[1], errors


def test_with_dropout_documents_stay_apart():
    """Dropout goes to PyTorch's kernel, which takes documents apart only by a mask."""
    query, key, value = inputs(4, 4, torch.float32)
    mask = hidden(torch.float32)
    torch.manual_seed(0)
    before, _ = attend(torch.nn.Module(), query, key, value, mask, dropout=0.5, position_ids=POSITIONS)
    other = value.detach().clone()
    other[0, :, 1 : QUERIES + 71] += 1  # the second document
    torch.manual_seed(0)
    after, _ = attend(torch.nn.Module(), query, key, other, mask, dropout=0.5, position_ids=POSITIONS)
    assert torch.equal(before[0, QUERIES + 71 :], after[0, QUERIES + 71 :])
    assert not torch.equal(before[0, 1 : QUERIES + 71], after[0, 1 : QUERIES + 71])
    plain, _ = attend(torch.nn.Module(), query, key, value, mask, position_ids=POSITIONS)
    assert not torch.allclose(plain, before)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_no_packed_block_goes_to_pytorchs_kernel(monkeypatch, kind, mixed):
    """It would be as right, only slower, and nothing would say so."""
    monkeypatch.setattr(attention, "sdpa_attention_forward", None)
    fast = train_tokenizer(sentences(2000, 1), {"vocab_size": 400}).tokenizer
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "attn_pdrop": 0.0} if kind == "gpt2" else SHAPE
    shape = shape | (EXPERTS if kind == "qwen3_moe" else {})
    model = build_model({"model_type": kind, **shape}, fast, "documents", 0).train()
    window = torch.arange(65).numpy()
    sample = pack(window, np.array([0, 20]), 64, 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        model(**{key: tensor[None] for key, tensor in sample.items()}, use_cache=False).loss.backward()


def test_a_model_that_trains_with_it_generates_as_with_pytorchs_own():
    """Samples during training come from this very model: padded prompts and a cache."""
    fast = train_tokenizer(sentences(2000, 1), {"vocab_size": 400}).tokenizer
    prompts = [prompt_ids(fast, text) for text in ("山", "今日、先生は学校で")]
    config = generation.generation_config({"max_new_tokens": 12, "do_sample": False}, fast)
    answers = []
    for name in ("documents", "sdpa"):
        model = build_model({"model_type": "qwen3", **SHAPE}, fast, name, 0)
        answers.append(generation.generate_all(model, fast, prompts, config, 0, batch_size=2))
    assert answers[0] == answers[1]
