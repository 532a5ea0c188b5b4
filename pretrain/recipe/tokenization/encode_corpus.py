"""Encodes the shards of stage 02 into token files: one task per shard, one worker per core.

Workers do not import torch or transformers. They read a tokenizer folder with sentencepiece or tokenizers,
the libraries that encode.
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

BATCH = 128  # documents that a worker encodes at once and holds in memory

Encoder = Callable[[list[str]], list[np.ndarray]]


@functools.cache
def make_encoder(folder: Path) -> Encoder:
    """The fastest exact encoder of a tokenizer folder: from texts to int32 ids, on one thread.

    If the folder has an ``spm.model``, SentencePiece encodes: stage 03 has checked that its ids are
    identical. Otherwise the tokenizers library encodes, after the word segmenter if the folder names one.
    Neither adds control tokens, and both read the name of a control token as text.
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
    """(ids before, ids after) each document: the document-start token or nothing, and the EOS.

    The document-start token is the ``bos_token``, if the saved tokenizer itself puts it before a text.
    Raises RecipeError when there is no EOS.
    """
    tokenizer, config = _load(folder), read_json(folder / "tokenizer_config.json")

    def id_of(name: str) -> int | None:
        token = config.get(name)
        return tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token or "")

    bos, eos = id_of("bos_token"), id_of("eos_token")
    if eos is None:
        raise RecipeError(
            f"{folder}/tokenizer_config.json: eos_token: {config.get('eos_token')!r} is not a token of "
            "tokenizer.json, but every document must end with one. Make the tokenizer with an EOS (stage 03)"
        )
    starts = bos is not None and tokenizer.encode("あ").ids[0] == bos
    return [bos] if starts else [], [eos]


def vocab_size(folder: Path) -> int:
    """The largest id of a saved tokenizer plus one; added tokens count, too."""
    return max(_load(folder).get_vocab(with_added_tokens=True).values()) + 1


@dataclass
class ShardEncoder:
    """A pipeline step: task `rank` encodes shard `rank` into a token file in the folder `parts`.

    shards: paths of Parquet shards. tokenizer: the folder of stage 03. before, after: see `document_frame`.
    vocab_size: see `vocab_size`. The token file has the name of its shard. Next to it, a ``.json`` is written
    last: documents, bytes (UTF-8, only the text), tokens and largest_id.
    """

    shards: list[str]
    tokenizer: str
    before: list[int]
    after: list[int]
    vocab_size: int
    parts: str

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        """Encode one shard; the data engine calls this in a worker."""
        shard = Path(self.shards[rank])
        prefix = Path(self.parts) / shard.stem
        counts = {"documents": 0, "bytes": 0, "tokens": 0, "largest_id": 0}
        encode = make_encoder(Path(self.tokenizer))
        documents = encode_shard(shard, encode, self.before, self.after, counts)
        written = write_token_file(prefix, documents, self.vocab_size)
        counts["documents"], counts["tokens"], counts["largest_id"] = written
        rows = count_rows(shard)
        if counts["documents"] != rows:
            raise RecipeError(
                f"{shard}: {rows} rows, but {counts['documents']} documents were encoded. "
                "Run stage 02 with --force"
            )
        write_json(prefix.with_suffix(".json"), counts)


def encode_shard(
    shard: Path, encode: Encoder, before: list[int], after: list[int], counts: dict[str, int]
) -> Iterator[np.ndarray]:
    """The documents of a shard as int32 ids, between `before` and `after`; adds to ``counts["bytes"]``.

    Raises RecipeError for a shard that cannot be read, and for a document whose text has no tokens.
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
