"""Token files and packed blocks: nothing lost, nothing doubled, documents kept apart in the model that
trains.
"""

import itertools
import struct
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import SHAPE
from recipe.outputs import RecipeError
from recipe.packing import IGNORED, PackedBlocks, PackedConversations, TokenFile, permuted, write_token_file

DOCUMENTS = [[2, *range(10, 10 + n), 3] for n in (1, 7, 30, 4, 4, 90, 2, 13)]


@pytest.fixture
def token_file(tmp_path):
    write_token_file(tmp_path / "train", iter(DOCUMENTS), 8000)
    return TokenFile(tmp_path / "train")


def test_round_trip_and_dtype(tmp_path, token_file):
    assert token_file.tokens.dtype == np.uint16
    assert token_file.tokens.tolist() == [i for document in DOCUMENTS for i in document]
    write_token_file(tmp_path / "wide", iter([[70_000]]), 100_000)
    assert TokenFile(tmp_path / "wide").tokens.tolist() == [70_000]


def test_index_is_megatrons_layout(tmp_path, token_file):
    raw = (tmp_path / "train.idx").read_bytes()
    magic, version, code, sequences, bounds = struct.unpack_from("<9sQBQQ", raw)
    assert (magic, version, code, sequences, bounds) == (b"MMIDIDX\x00\x00", 1, 8, 8, 9)
    lengths = np.frombuffer(raw, "<i4", sequences, 34)
    offsets = np.frombuffer(raw, "<i8", sequences, 34 + 4 * sequences)
    assert lengths.tolist() == [len(document) for document in DOCUMENTS]
    assert offsets.tolist() == (np.cumsum(lengths) - lengths).astype(int).__mul__(2).tolist()
    assert np.frombuffer(raw, "<i8", bounds, 34 + 12 * sequences).tolist() == list(range(9))


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_truncated_file_is_refused(tmp_path, token_file, suffix):
    path = tmp_path / f"train{suffix}"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RecipeError, match=f"train{suffix}"):
        TokenFile(tmp_path / "train")


def test_missing_file_names_the_stage(tmp_path):
    with pytest.raises(RecipeError, match="Run stage 04"):
        TokenFile(tmp_path / "nothing")


def test_an_epoch_holds_every_token_once(token_file):
    samples = PackedBlocks(token_file, 16, pad=0, seed=1, epochs=3)
    total = len(token_file.tokens)
    wanted_inputs = Counter(token_file.tokens.tolist())
    # Every token is a target once, but a document's first: nothing predicts it.
    wanted_targets = Counter(i for document in DOCUMENTS for i in document[1:])
    for epoch in range(3):
        inputs, targets, places = Counter(), Counter(), 0
        for item in range(epoch * samples.blocks, (epoch + 1) * samples.blocks):
            sample = samples[item]
            ids, labels = sample["input_ids"].tolist(), sample["shift_labels"].tolist()
            inputs.update(i for i in ids if i != 0)
            targets.update(i for i in labels if i != IGNORED)
            places += len(ids)
        assert inputs == wanted_inputs
        assert targets == wanted_targets
        assert places == -(-total // 16) * 16


def test_positions_restart_with_each_document(token_file):
    ids, positions = [], []
    for sample in PackedBlocks(token_file, 1000, pad=0):
        ids += sample["input_ids"].tolist()
        positions += sample["position_ids"].tolist()
        break
    wanted = [place for document in DOCUMENTS for place in range(len(document))]
    assert positions[: len(wanted)] == wanted
    assert positions[len(wanted)] == 0  # the padding is a document of its own


def test_order_depends_on_seed_epoch_and_index_only(token_file):
    def order(samples, epoch):
        return [
            tuple(samples[epoch * samples.blocks + i]["input_ids"].tolist()) for i in range(samples.blocks)
        ]

    first, again = (PackedBlocks(token_file, 16, 0, seed=7, epochs=2) for _ in range(2))
    other = PackedBlocks(token_file, 16, 0, seed=8, epochs=2)
    assert order(first, 0) == order(again, 0)
    assert order(first, 0) != order(first, 1)
    assert order(first, 0) != order(other, 0)
    assert sorted(order(first, 0)) == sorted(order(first, 1))


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


# Compiled only as the recipe tiny trains: a compilation takes 10 s.
@pytest.mark.parametrize(
    ("kind", "attention", "compiled"),
    [
        *itertools.product(["qwen3", "mistral", "gpt2"], ["sdpa", "eager"], [False]),
        ("qwen3", "sdpa", True),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_document_does_not_see_the_one_before(kind, attention, compiled, training):
    """Through the very call that trains and evaluates: the items of PackedBlocks, without mask and cache."""
    from recipe.modeling import build_model
    from recipe.packing import pack

    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    shape = gpt2 if kind == "gpt2" else SHAPE

    class Tokenizer:
        pad_token_id, bos_token_id, eos_token_id = 0, 2, 3

        def __len__(self):
            return 50

    model = build_model({"model_type": kind, **shape}, Tokenizer(), attention, 0).train(training)
    model.config.use_cache = False
    call = torch.compile(model) if compiled else model
    starts = np.array([0, 9])
    window = np.array([2, *range(10, 17), 3, 2, *range(20, 27), 3])
    other = window.copy()
    other[1:8] = 40  # another document before the second one

    def logits(tokens):
        sample = {key: value[None] for key, value in pack(tokens, starts, 18, 0).items()}
        with torch.set_grad_enabled(training):
            return call(**sample).logits[0].detach()

    first, second = logits(window), logits(other)
    assert not torch.equal(first[:9], second[:9])  # the change is seen where it was made
    assert torch.equal(first[9:], second[9:])
