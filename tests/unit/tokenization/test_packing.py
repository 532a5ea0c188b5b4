"""Packed blocks: nothing lost, nothing doubled, documents kept apart in the model that trains."""

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import EXPERTS, GEMMA3, SHAPE
from recipe.project import RecipeError
from recipe.tokenization.packing import (
    IGNORED,
    PackedBlocks,
    PackedConversations,
    check_vocabulary,
    epoch_segments,
    epoch_tokens,
    pack,
    permuted,
    weighted_sources,
)
from recipe.tokenization.token_files import TokenFile, write_token_file

DOCUMENTS = [[2, *range(10, 10 + n), 3] for n in (1, 7, 30, 4, 4, 90, 2, 13)]
# Three sources of different documents, so that each token tells its position.
SOURCES = {"a": 5, "b": 20, "c": 3}
WEIGHTS = {"a": 2.0, "b": 0.3, "c": 1.5}


@pytest.fixture
def token_file(tmp_path):
    write_token_file(tmp_path / "train", iter(DOCUMENTS), 8000)
    return TokenFile(tmp_path / "train")


@pytest.fixture
def weighted(tmp_path):
    """(token file, sources, its documents): every token of the file has an id of its own."""
    fresh, documents = itertools.count(10), []
    for place in range(sum(SOURCES.values())):
        documents.append([next(fresh) for _ in range(3 + place % 4)])
    write_token_file(tmp_path / "weighted", iter(documents), 8000)
    firsts = np.cumsum([0, *SOURCES.values()])
    counts = {
        name: {"first_document": int(first), "documents": documents}
        for (name, documents), first in zip(SOURCES.items(), firsts, strict=False)
    }
    sources = weighted_sources(counts, {name: {"weight": weight} for name, weight in WEIGHTS.items()})
    return TokenFile(tmp_path / "weighted"), sources, documents


def items_of(samples, epoch):
    return range(samples.ends[epoch - 1] if epoch else 0, samples.ends[epoch])


def test_an_epoch_holds_every_token_once(token_file):
    blocks = -(-len(token_file.tokens) // 16)
    samples = PackedBlocks(token_file, 16, pad=0, seed=1, at_least=2 * blocks + 1)
    assert samples.ends == [blocks, 2 * blocks, 3 * blocks]  # whole epochs
    expected_inputs = Counter(token_file.tokens.tolist())
    # Every token is a target once, except the first of a document: nothing predicts it.
    expected_targets = Counter(i for document in DOCUMENTS for i in document[1:])
    for epoch in range(3):
        inputs, targets = Counter(), Counter()
        for item in items_of(samples, epoch):
            sample = samples[item]
            assert all(tensor.shape == (16,) and tensor.dtype == torch.int64 for tensor in sample.values())
            inputs.update(i for i in sample["input_ids"].tolist() if i != 0)
            targets.update(i for i in sample["shift_labels"].tolist() if i != IGNORED)
        assert inputs == expected_inputs
        assert targets == expected_targets


def test_a_block_is_the_documents_end_to_end_and_positions_restart(token_file):
    sample = PackedBlocks(token_file, 1000, pad=0)[0]
    ids = [i for document in DOCUMENTS for i in document]
    positions = [place for document in DOCUMENTS for place in range(len(document))]
    labels = [label for document in DOCUMENTS for label in [*document[1:], IGNORED]]
    rest = 1000 - len(ids)
    assert sample["input_ids"].tolist() == ids + [0] * rest
    assert sample["position_ids"].tolist() == positions + list(range(rest))  # a document of its own
    assert sample["labels"].tolist() == labels + [IGNORED] * rest
    assert sample["shift_labels"] is sample["labels"]


def test_a_label_across_blocks_is_kept_and_across_documents_is_masked(token_file):
    # The first documents are 3, 9 and 32 tokens long: a block of 12 ends with the second, one of 6 inside it.
    assert PackedBlocks(token_file, 12, pad=0)[0]["shift_labels"][-1] == IGNORED
    inside = PackedBlocks(token_file, 6, pad=0)
    assert inside[0]["shift_labels"][-1] == inside[1]["input_ids"][0]


@pytest.mark.parametrize(
    ("seed", "items", "digest"),
    [
        (42, 33, "109d32f2755c3bc1635f8cf866bc8261ec3922b59431cbac2464b08dfd4c3275"),
        (None, 11, "8ac88f52b8de7e343835edfb5e58329f1f9e147bed51f29ddcf5f3a23d621cc3"),
    ],
)
def test_the_samples_of_a_seed_never_change(token_file, seed, items, digest):
    """A run that is continued after an update must read what it would have read."""
    for sources in (None, [(0, 3, 1.0), (3, 8, 1.0)]):
        samples = PackedBlocks(token_file, 16, 0, seed, items, sources)
        state = hashlib.sha256()
        for item in range(len(samples)):
            for key in ("input_ids", "position_ids", "shift_labels"):
                state.update(samples[item][key].numpy().tobytes())
        assert (len(samples), state.hexdigest()) == (items, digest)


def test_order_depends_on_seed_epoch_and_index_only(weighted):
    file, sources, _ = weighted

    def order(samples, epoch):
        return [tuple(samples[item]["input_ids"].tolist()) for item in items_of(samples, epoch)]

    for given in (None, sources):
        samples = PackedBlocks(file, 16, 0, 7, 100, given)
        other_seed = PackedBlocks(file, 16, 0, 8, 100, given)
        resumed = PackedBlocks(file, 16, 0, 7, 30, given)  # with fewer epochs, opened again
        backwards = [samples[item]["input_ids"].tolist() for item in reversed(range(len(resumed)))]
        assert backwards[::-1] == [resumed[item]["input_ids"].tolist() for item in range(len(resumed))]
        assert order(samples, 0) != order(samples, 1)
        assert order(samples, 0) != order(other_seed, 0)
        assert sorted(order(samples, 0)) == sorted(order(other_seed, 0))


# --------------------------------------------------------------------------------------------- weights


def read_documents(samples, documents, epoch):
    """How often each document occurs in an epoch, with all its tokens; padding is left out."""
    counts = Counter(i for item in items_of(samples, epoch) for i in samples[item]["input_ids"].tolist() if i)
    times = [{counts[i] for i in document} for document in documents]
    assert all(len(each) == 1 for each in times), "a document was cut"
    assert sum(counts.values()) == sum(len(d) * min(t) for d, t in zip(documents, times, strict=True))
    return [min(each) for each in times]


def test_a_weight_is_how_often_documents_are_seen_in_an_epoch(weighted):
    file, sources, documents = weighted
    samples = PackedBlocks(file, 16, 0, seed=3, at_least=10_000, sources=sources)
    first = read_documents(samples, documents, 0)
    assert first[:5] == [2] * 5
    assert first[5:25] == [1] * 6 + [0] * 14
    assert first[25:] == [2, 1, 1]  # 4 of 4.5
    seen = np.zeros(len(documents), int)
    for epoch in range(10):
        seen += read_documents(samples, documents, epoch)
        for begin, end, weight in sources:
            turns = (epoch + 1) * weight
            assert set(seen[begin:end]) <= {int(turns), int(turns) + 1}
    assert set(seen[:5]) == {20} and set(seen[5:25]) == {3} and set(seen[25:]) == {15}


def test_every_token_of_a_weighted_epoch_but_first_ones_is_a_target(weighted):
    file, sources, documents = weighted
    samples = PackedBlocks(file, 16, 0, seed=3, at_least=500, sources=sources)
    for epoch in range(4):
        times = read_documents(samples, documents, epoch)
        expected = Counter()
        for document, count in zip(documents, times, strict=True):
            expected.update(dict.fromkeys(document[1:], count) if count else {})
        targets, positions = Counter(), Counter()
        for item in items_of(samples, epoch):
            sample = samples[item]
            targets.update(i for i in sample["shift_labels"].tolist() if i != IGNORED)
            pairs = zip(sample["input_ids"].tolist(), sample["position_ids"].tolist(), strict=True)
            # A document that a block cuts starts at 0 in the next block, as it does without weights.
            positions.update(i for i, place in pairs if place == 0 and i)
        assert targets == expected
        starts = {document[0] for document in documents}
        assert sum(positions[i] for i in starts) == sum(times)


def test_segments_are_cut_at_documents_and_none_is_empty(weighted):
    file, sources, documents = weighted
    bounds = set(np.cumsum([0, *map(len, documents)]).tolist())
    for epoch in range(20):
        for begin, end in epoch_segments(file, sources, epoch):
            assert begin < end and {begin, end} <= bounds
    assert epoch_segments(file, sources, 7) == epoch_segments(file, list(sources), 7)
    # A source of one document and weight 0.25 is read in every fourth epoch.
    lengths = [len(epoch_segments(file, [(0, 1, 0.25)], epoch)) for epoch in range(8)]
    assert lengths == [0, 0, 0, 1, 0, 0, 0, 1]


def test_an_epoch_without_documents_is_skipped(weighted):
    file, _, documents = weighted
    samples = PackedBlocks(file, 2, 0, seed=1, at_least=4, sources=[(0, 1, 0.25)])
    assert samples.ends == [0, 0, 0, 2, 2, 2, 2, 4]
    for half in (range(0, 2), range(2, 4)):
        ids = [i for item in half for i in samples[item]["input_ids"].tolist() if i]
        assert sorted(ids) == documents[0]


def test_tokens_of_an_epoch_follow_the_weights(weighted):
    file, sources, documents = weighted
    parts = [sum(map(len, documents[begin:end])) for begin, end, _ in sources]
    expected = 2 * parts[0] + 0.3 * parts[1] + 1.5 * parts[2]
    assert epoch_tokens(file, sources) == round(expected)
    assert epoch_tokens(file, None) == len(file.tokens)


def test_without_weights_nothing_is_weighted():
    counts = {"a": {"first_document": 0, "documents": 3}, "b": {"first_document": 3, "documents": 4}}
    assert weighted_sources(counts, {"a": {}, "b": {"weight": 1}}) is None
    assert weighted_sources(counts, {"a": {}, "b": {"weight": 2}}) == [(0, 3, 1.0), (3, 7, 2.0)]


# ------------------------------------------------------------------------------------------- bad input


def test_a_file_without_tokens_is_refused(tmp_path):
    write_token_file(tmp_path / "valid", iter([]), 8000)
    with pytest.raises(RecipeError, match=r"valid\.bin: no tokens"):
        PackedBlocks(TokenFile(tmp_path / "valid"), 16, 0)


def test_ids_past_the_models_vocabulary_are_refused(token_file):
    check_vocabulary(token_file, 99, 100)
    with pytest.raises(RecipeError, match=r"train\.bin: contains the id 99.*vocabulary has 99 entries"):
        check_vocabulary(token_file, 99, 99)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 257, 1000])
def test_permutation(size):
    result = [permuted(i, size, 5) for i in range(size)]
    assert sorted(result) == list(range(size))
    if size >= 10:
        assert result != list(range(size))


def test_conversations_are_whole_and_only_answers_are_targets():
    conversations = [
        ([2, *([5] * n), *([9] * n), 3], [False] * (n + 1) + [True] * (n + 1)) for n in range(1, 12)
    ]
    samples = PackedConversations(conversations, 32, pad=0, seed=3)
    seen = []
    for item in range(len(samples)):
        sample = samples[item]
        ids, labels, positions = (
            sample[key].tolist() for key in ("input_ids", "shift_labels", "position_ids")
        )
        starts = [i for i, place in enumerate(positions) if place == 0]
        for start, end in zip(starts, [*starts[1:], 32], strict=True):
            if ids[start] == 2:
                seen.append(tuple(ids[start:end]))
        for place, label in enumerate(labels):
            assert label in (9, 3, IGNORED)
            if label != IGNORED:
                assert label == ids[place + 1]
    assert sorted(seen) == sorted(tuple(ids) for ids, _ in conversations)
    assert sum((samples[i]["shift_labels"] != IGNORED).sum().item() for i in range(len(samples))) == sum(
        sum(flags) for _, flags in conversations
    )


# --------------------------------------------------------------------- documents do not see each other

KINDS = {
    "qwen3": SHAPE,
    "llama": SHAPE,
    # A window shorter than a document, so that it matters, and long enough to reach the one before.
    "mistral": SHAPE | {"sliding_window": 6},
    "olmo2": SHAPE,
    "gemma3_text": SHAPE | GEMMA3,
    "qwen3_moe": SHAPE | EXPERTS,
    # A window in the second layer only.
    "qwen2": SHAPE | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
}
# An expert multiplies the tokens of both documents at once: some CPUs round by the number of rows.
ROUNDING = {"qwen3_moe": 2**-24}
STARTS = np.array([0, 9])
WINDOW = np.array([2, *range(10, 17), 3, 2, *range(20, 27), 3])
OTHER = WINDOW.copy()
OTHER[1:8] = 40  # another document before the second one


def build(kind, attention):
    from recipe.model.build import build_model

    class Tokenizer:
        pad_token_id, bos_token_id, eos_token_id = 0, 2, 3

        def __len__(self):
            return 50

    model = build_model({"model_type": kind, **KINDS[kind]}, Tokenizer(), attention, 0)
    model.config.use_cache = False
    return model


def logits(call, tokens, starts, training):
    """Through the very call that trains and evaluates: an item of PackedBlocks, without mask and cache."""
    sample = {key: value[None] for key, value in pack(tokens, starts, 18, 0).items()}
    with torch.set_grad_enabled(training):
        if training:
            return call(**sample).logits[0].detach()
        return call(input_ids=sample["input_ids"], position_ids=sample["position_ids"]).logits[0]


def check_separation(kind, attention, training, backend):
    torch.compiler.reset()
    model = build(kind, attention).train(training)
    call = torch.compile(model, backend=backend) if backend else model
    first, second = (logits(call, tokens, STARTS, training) for tokens in (WINDOW, OTHER))
    assert not torch.equal(first[:9], second[:9])  # the change is seen where it was made
    torch.testing.assert_close(first[9:], second[9:], rtol=0, atol=ROUNDING.get(kind, 0))
    # As one document, the same tokens do see each other: the test can tell.
    joined, changed = (logits(call, tokens, np.array([0]), training) for tokens in (WINDOW, OTHER))
    assert (joined[9:] - changed[9:]).abs().max() > 1e-3
    # Positions restart, learned ones too: the second document means the same at a block's beginning.
    alone = logits(call, WINDOW[9:], np.array([0]), training)
    torch.testing.assert_close(first[9:18], alone[:9], rtol=1e-4, atol=1e-5)


CASES = list(itertools.product(KINDS, ["documents", "sdpa", "eager"], [True, False]))


@pytest.mark.parametrize(("kind", "attention", "training"), CASES)
def test_a_document_does_not_see_the_one_before(kind, attention, training):
    check_separation(kind, attention, training, None)


# aot_eager traces and differentiates as the real compiler does and spends no time on kernels.
@pytest.mark.parametrize(("kind", "attention", "training"), CASES)
def test_a_document_does_not_see_the_one_before_when_traced(kind, attention, training):
    check_separation(kind, attention, training, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "attention", "training"), CASES)
def test_a_document_does_not_see_the_one_before_when_compiled(kind, attention, training):
    check_separation(kind, attention, training, "inductor")


def test_a_document_does_not_see_the_one_before_as_the_recipe_tiny_trains():
    check_separation("qwen3", "documents", True, "inductor")
