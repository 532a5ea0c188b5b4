"""Bulk tokenisation: the shards of stage 02 to token files, a task per shard, a worker per core.

Workers import neither torch nor transformers: a tokenizer folder is read with the libraries that encode,
sentencepiece and tokenizers.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import tokenizers

from recipe.corpus.shards import count_rows, read_shard
from recipe.project import RecipeError, read_json, write_json
from recipe.tokenization.encode_text import segmenter, without_control_tokens
from recipe.tokenization.token_files import write_token_file

BATCH = 128  # documents encoded at once: what a worker holds in memory

Encoder = Callable[[list[str]], list[np.ndarray]]


@functools.cache
def make_encoder(folder: Path) -> Encoder:
    """The fastest exact encoder of a tokenizer folder: texts to ids, one thread, no control tokens added.

    SentencePiece itself where there is an ``spm.model``: stage 03 has proved its ids identical. Else the
    tokenizers library, after the word segmenter that the folder names, if it names one. Strings that spell a
    special token are text in both.
    """
    model = folder / "spm.model"
    if model.is_file():
        import sentencepiece as spm

        processor = spm.SentencePieceProcessor(model_file=str(model))
        return lambda texts: processor.encode(texts, return_type="numpy", num_threads=1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = without_control_tokens((folder / "tokenizer.json").read_text("utf-8"))
    name = read_json(folder / "tokenizer_config.json").get("segmenter")

    def encode(texts: list[str]) -> list[np.ndarray]:
        if name:
            texts = segmenter(name).segment(texts)
        return [np.array(encoding.ids, np.int32) for encoding in tokenizer.encode_batch_fast(texts)]

    return encode


def _load(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def document_frame(folder: Path) -> tuple[list[int], list[int]]:
    """(ids before, ids after) each document: the document-start token, if there is one, and the EOS.

    A document-start token is one that the saved tokenizer itself puts before a text: a ``bos_token`` that its
    post-processor does not add is for other uses. Raises RecipeError without an EOS.
    """
    tokenizer, config = _load(folder), read_json(folder / "tokenizer_config.json")

    def id_of(name: str) -> int | None:
        token = config.get(name)
        return tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token or "")

    bos, eos = id_of("bos_token"), id_of("eos_token")
    if eos is None:
        raise RecipeError(
            f"{folder}/tokenizer_config.json: eos_token: {config.get('eos_token')!r} is no token of "
            "tokenizer.json. Every document must end with one: make the tokenizer with an EOS (stage 03)"
        )
    starts = bos is not None and tokenizer.encode("あ").ids[0] == bos
    return [bos] if starts else [], [eos]


def vocab_size(folder: Path) -> int:
    """One more than the largest id of a saved tokenizer, added tokens included."""
    return max(_load(folder).get_vocab(with_added_tokens=True).values()) + 1


@dataclass
class ShardEncoder:
    """A pipeline step: task `rank` encodes shard `rank` into a token file of the shard's name in `parts`.

    shards: paths of Parquet shards. tokenizer: folder of stage 03. before, after, vocab_size: see
    `document_frame` and `vocab_size`. Beside each token file lies a ``.json``, written last, with its
    documents, bytes (UTF-8, of the text alone), tokens and largest_id.
    """

    shards: list[str]
    tokenizer: str
    before: list[int]
    after: list[int]
    vocab_size: int
    parts: str

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        """Encode one shard; called by the data engine in a worker."""
        shard = Path(self.shards[rank])
        prefix = Path(self.parts) / shard.stem
        counts = {"documents": 0, "bytes": 0, "tokens": 0, "largest_id": 0}
        encode = make_encoder(Path(self.tokenizer))
        documents = encode_shard(shard, encode, self.before, self.after, counts)
        written = write_token_file(prefix, documents, self.vocab_size)
        counts["documents"], counts["tokens"], counts["largest_id"] = written
        rows = count_rows(shard)
        if counts["documents"] != rows:
            raise RecipeError(f"{shard}: {rows} rows, but {counts['documents']} documents were encoded")
        record = prefix.with_suffix(".json.part")
        write_json(record, counts)
        record.rename(prefix.with_suffix(".json"))


def encode_shard(
    shard: Path, encode: Encoder, before: list[int], after: list[int], counts: dict[str, int]
) -> Iterator[np.ndarray]:
    """The documents of a shard as int32 ids, framed by `before` and `after`; adds to ``counts["bytes"]``.

    Raises RecipeError for a shard that cannot be read and for a document that has no tokens of its own.
    """
    head, tail = np.array(before, np.int32), np.array(after, np.int32)
    for rows in read_shard(shard, BATCH):
        texts = rows["text"].to_pylist()
        counts["bytes"] += pc.sum(pc.binary_length(rows["text"])).as_py()
        for row, ids in enumerate(encode(texts)):
            if not len(ids):
                raise RecipeError(
                    f"{shard}: document {rows['id'][row]} ({texts[row][:40]!r}) has no tokens. "
                    "Stage 02 must drop such text: see dataset.minimum_characters"
                )
            yield np.concatenate((head, ids, tail))
