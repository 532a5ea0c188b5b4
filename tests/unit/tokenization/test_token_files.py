"""Token files: Megatron-LM's format to the byte, whole or not there, damage named."""

import pickle
import struct

import numpy as np
import pytest
from recipe.project import RecipeError
from recipe.tokenization.token_files import TokenFile, join_token_files, write_token_file

DOCUMENTS = [[2, *range(10, 10 + n), 3] for n in (1, 7, 30, 4, 4, 90, 2, 13)]


@pytest.fixture
def token_file(tmp_path):
    write_token_file(tmp_path / "train", iter(DOCUMENTS), 8000)
    return TokenFile(tmp_path / "train")


def test_round_trip_and_counts(tmp_path):
    written = write_token_file(tmp_path / "train", (np.array(d, np.int32) for d in DOCUMENTS), 8000)
    file = TokenFile(tmp_path / "train")
    assert written == (8, sum(map(len, DOCUMENTS)), 99)
    assert file.tokens.tolist() == [i for document in DOCUMENTS for i in document]
    assert file.lengths.tolist() == list(map(len, DOCUMENTS))


@pytest.mark.parametrize(("vocabulary", "dtype"), [(65_536, np.uint16), (65_537, np.int32)])
def test_dtype_follows_the_vocabulary(tmp_path, vocabulary, dtype):
    write_token_file(tmp_path / "t", iter([[vocabulary - 1]]), vocabulary)
    file = TokenFile(tmp_path / "t")
    assert file.tokens.dtype == dtype and file.tokens.tolist() == [vocabulary - 1]


def test_index_is_megatrons_layout(tmp_path, token_file):
    raw = (tmp_path / "train.idx").read_bytes()
    magic, version, code, sequences, bounds = struct.unpack_from("<9sQBQQ", raw)
    assert (magic, version, code, sequences, bounds) == (b"MMIDIDX\x00\x00", 1, 8, 8, 9)
    lengths = np.frombuffer(raw, "<i4", sequences, 34)
    offsets = np.frombuffer(raw, "<i8", sequences, 34 + 4 * sequences)
    assert lengths.tolist() == [len(document) for document in DOCUMENTS]
    assert offsets.tolist() == ((np.cumsum(lengths) - lengths) * 2).tolist()
    assert np.frombuffer(raw, "<i8", bounds, 34 + 12 * sequences).tolist() == list(range(9))


@pytest.mark.extra("megatron")
@pytest.mark.filterwarnings("ignore")  # about Transformer Engine and Apex, which are not installed
@pytest.mark.parametrize("vocabulary", [8_000, 100_000])
def test_megatron_reads_the_same_documents(tmp_path, vocabulary):
    from megatron.core.datasets import indexed_dataset

    documents = [*DOCUMENTS, [vocabulary - 1, 3]]
    write_token_file(tmp_path / "a", iter(documents[:4]), vocabulary)
    write_token_file(tmp_path / "b", iter(documents[4:]), vocabulary)
    join_token_files([tmp_path / "a", tmp_path / "b"], tmp_path / "train")
    theirs = indexed_dataset.IndexedDataset(str(tmp_path / "train"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == documents
    assert theirs.document_indices.tolist() == list(range(len(documents) + 1))


def test_joined_parts_are_the_file_written_at_once(tmp_path, token_file):
    for name, part in (("a", DOCUMENTS[:3]), ("empty", []), ("b", DOCUMENTS[3:])):
        write_token_file(tmp_path / name, iter(part), 8000)
    counts = join_token_files([tmp_path / name for name in ("a", "empty", "b")], tmp_path / "joined")
    assert counts == (8, sum(map(len, DOCUMENTS)))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"joined{suffix}").read_bytes() == (tmp_path / f"train{suffix}").read_bytes()


def test_more_parts_are_joined_than_may_be_open(tmp_path, few_open_files):
    parts = [tmp_path / str(number) for number in range(30)]
    for number, part in enumerate(parts):
        write_token_file(part, iter([[number], [7, number]]), 8000)
    assert join_token_files(parts, tmp_path / "joined") == (60, 90)
    assert TokenFile(tmp_path / "joined").tokens.tolist() == [i for n in range(30) for i in (n, 7, n)]


def test_parts_of_two_dtypes_are_not_joined(tmp_path, token_file):
    write_token_file(tmp_path / "wide", iter([[70_000]]), 100_000)
    with pytest.raises(RecipeError, match="2 dtypes"):
        join_token_files([tmp_path / "train", tmp_path / "wide"], tmp_path / "joined")
    assert not (tmp_path / "joined.bin").exists()


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("change", [lambda raw: raw[:-3], lambda raw: raw[:10], lambda raw: raw + b"\0\0"])
def test_a_truncated_or_grown_file_is_refused(tmp_path, token_file, suffix, change):
    path = tmp_path / f"train{suffix}"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(RecipeError, match=rf"train\{suffix}.*--force"):
        TokenFile(tmp_path / "train")


def test_files_that_do_not_belong_together_are_refused(tmp_path, token_file):
    write_token_file(tmp_path / "other", iter(DOCUMENTS[:-1]), 8000)
    (tmp_path / "other.idx").replace(tmp_path / "train.idx")
    with pytest.raises(RecipeError, match=r"train\.bin: \d+ bytes, expected \d+ by its index"):
        TokenFile(tmp_path / "train")


def test_several_sequences_in_a_document_are_refused(tmp_path, token_file):
    raw = bytearray((tmp_path / "train.idx").read_bytes())
    struct.pack_into("<Q", raw, 26, 5)
    (tmp_path / "train.idx").write_bytes(raw)
    with pytest.raises(RecipeError, match="4 documents in 8 sequences"):
        TokenFile(tmp_path / "train")


def test_missing_file_names_the_stage(tmp_path):
    with pytest.raises(RecipeError, match="Run stage 04"):
        TokenFile(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("bad", "message"), [([], "document 8 has no tokens"), ([9_000], "id 9000.*8000"), ([-1], "id -1")]
)
def test_bad_documents_are_refused_and_nothing_is_overwritten(tmp_path, token_file, bad, message):
    before = {p.name: p.read_bytes() for p in tmp_path.glob("train.???")}
    with pytest.raises(RecipeError, match=message):
        write_token_file(tmp_path / "train", iter([*DOCUMENTS, bad]), 8000)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("train.???")} == before


def test_document_starts(token_file):
    starts = np.cumsum([0, *map(len, DOCUMENTS)])
    for begin, end in ((0, 3), (0, 4), (3, 12), (4, 5), (5, 1000), (1000, 2000)):
        expected = [s for s in starts[:-1] if begin <= s < end]
        assert token_file.document_starts(begin, end).tolist() == expected
    assert [token_file.first_token(i) for i in range(9)] == starts.tolist()


def test_a_pickle_holds_the_path_and_no_tokens(tmp_path):
    write_token_file(tmp_path / "long", iter([[5] * 100_000]), 8000)
    pickled = pickle.dumps(TokenFile(tmp_path / "long"))
    assert len(pickled) < 1000
    assert pickle.loads(pickled).tokens.tolist() == [5] * 100_000
