"""The samples of a pretraining with phases: functions of (seed, index), with equal numbers of tokens."""

import numpy as np
import pytest
import torch
from recipe.config.phases import phases_of
from recipe.project import RecipeError
from recipe.tokenization.packing import PackedBlocks, collate
from recipe.tokenization.phased import phased_blocks
from recipe.tokenization.token_files import TokenFile, write_token_file

VALUES = {"global_batch_size": 4, "block_size": 8}
# The documents of "a" have the ids below 50, those of "b" the others.
COUNTS = {"a": {"first_document": 0, "documents": 60}, "b": {"first_document": 60, "documents": 20}}
CONFIG = {"a": {}, "b": {}}
KEYS = ("input_ids", "position_ids", "labels", "shift_labels")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    draw = np.random.default_rng(0)
    documents = [
        draw.integers(1 + 50 * (number >= 60), 50 + 50 * (number >= 60), draw.integers(3, 30))
        for number in range(80)
    ]
    prefix = tmp_path_factory.mktemp("tokens") / "train"
    write_token_file(prefix, documents, 100)
    return TokenFile(prefix)


def samples(file, rows, steps):
    values = VALUES | {"phases": rows}
    longest = max(row.get("block_size", 8) for row in rows)
    return phased_blocks(file, phases_of(values, steps), 32 // longest, longest, 0, 7, COUNTS, CONFIG)


def equal(one, other):
    return all(torch.equal(one[key], other[key]) for key in KEYS)


def test_one_phase_is_the_run_without_phases(file):
    found, plain = samples(file, [{}], 20), PackedBlocks(file, 8, 0, 7, 80)
    assert len(found) == 80
    assert all(equal(collate([found[i]]), collate([plain[i]])) for i in range(80))


def test_the_block_size_changes_and_the_tokens_of_a_sample_do_not(file):
    found = samples(file, [{"until_step": 3}, {"block_size": 16}, {"block_size": 8}][:2], 5)
    assert [found[i]["input_ids"].shape for i in (0, 5, 6, 9)] == [(2, 8), (2, 8), (1, 16), (1, 16)]
    batch = collate([found[0], found[1]])
    assert all(batch[key].shape == (4, 8) for key in KEYS)
    long = PackedBlocks(file, 16, 0, 7, 4)
    assert all(equal(found[6 + i], collate([long[i]])) for i in range(4))


def test_the_mixture_changes_at_its_step(file):
    found = samples(file, [{"until_step": 2, "sources": {"a": 1}}, {"sources": {"b": 1}}], 4)
    ids = [found[i]["input_ids"] for i in range(16)]
    assert all((block < 50).all() for block in ids[:8]) and all((block >= 50).any() for block in ids[8:])
    both = samples(file, [{"sources": {"a": 1, "b": 3}}], 40)
    counted = torch.cat([both[i]["input_ids"] for i in range(len(both))])
    tokens = [file.first_token(60), file.first_token(80) - file.first_token(60)]
    expected = 3 * tokens[1] / (tokens[0] + 3 * tokens[1])
    assert float((counted > 50).float().mean()) == pytest.approx(expected, abs=0.05)


def test_a_mixture_that_returns_goes_on_where_it_has_stopped(file):
    rows = [{"until_step": 2}, {"until_step": 3, "sources": {"b": 1}}, {"rate": 0.5}]
    found, plain = samples(file, rows, 6), PackedBlocks(file, 8, 0, 7, 80)
    assert all(equal(found[12 + i], collate([plain[8 + i]])) for i in range(12))


def test_a_longer_run_has_the_same_samples_before(file):
    rows = [{"until_step": 2}, {"block_size": 16}]
    short, long = samples(file, rows, 4), samples(file, rows, 40)
    assert len(long) > len(short) and all(equal(short[i], long[i]) for i in range(len(short)))


def test_a_source_without_documents_is_named(file):
    with pytest.raises(RecipeError, match="phases: sources: c: stage 04 has no training document"):
        samples(file, [{"sources": {"c": 1}}], 4)
