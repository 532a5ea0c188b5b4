"""SentencePiece with byte fallback: train it, convert it to a fast Hugging Face tokenizer, prove that both
agree.
"""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece as spm
from transformers import PreTrainedTokenizerFast

from recipe.outputs import RecipeError

SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "</s>")  # their places are the ids in config.SPECIAL_IDS
LONGEST_SENTENCE = 4000  # characters
# What a conversion gets wrong first: rare kanji, joined emoji, half-width kana, white space of every kind,
# nothing.
HARD_CASES = (
    "明治天皇は大嘗宮を主宰した。",
    "𠮷野家で𩸽を食べる。",
    "👨‍👩‍👧‍👦と🏳️‍🌈",
    "ﾊﾝｶｸ ｶﾅ",
    "全角　空白",
    "  二つ  の  空白  ",
    "タブ\tと\n改行\r\nと\x01制御文字",
    "",
    " ",
    "\n",
    "e\u0301 が\u3099",
    "10〜20時",
    "<0xE5>という文字列",
    "ABC" * 300,
)


def sample_lines(texts: Iterable[str], most_bytes: int, total_bytes: int, seed: int) -> Iterator[str]:
    """About `most_bytes` of sentences drawn evenly from texts of `total_bytes` in all; the draw is seeded.

    Texts are cut after 。 and at line ends: SentencePiece's time and memory follow from the length of its
    sentences.
    """
    share = min(1.0, most_bytes / max(1, total_bytes))
    draw = random.Random(seed).random
    for text in texts:
        for line in text.split("\n"):
            for sentence in re.split(r"(?<=。)", line):
                if sentence and draw() < share:
                    for begin in range(0, len(sentence), LONGEST_SENTENCE):
                        yield sentence[begin : begin + LONGEST_SENTENCE]


def train_sentencepiece(sentences: Iterable[str], config: dict[str, Any], threads: int) -> bytes:
    """Train a model by tokenizer.json and return it serialised. Raises RecipeError when the text cannot
    support it.
    """
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            minloglevel=2,
            num_threads=threads,
            model_type=config.get("model_type", "unigram"),
            vocab_size=config["vocab_size"],
            byte_fallback=True,
            character_coverage=config.get("character_coverage", 0.9995),
            split_digits=config.get("split_digits", True),
            # The text is normalised once, in stage 02; here nothing may change it, so that decoding is exact.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # A space is a piece also where the sample has none: spelt in bytes it would come back as U+2581.
            required_chars="▁",
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece="<pad>",
            unk_piece="<unk>",
            bos_piece="<s>",
            eos_piece="</s>",
            # Longer sentences would be skipped silently; sample_lines never makes them.
            max_sentence_length=4 * LONGEST_SENTENCE,
            seed_sentencepiece_size=max(100_000, 16 * config["vocab_size"]),
        )
    except (RuntimeError, OSError) as error:
        # Its own words are about its source lines; the one number that helps is the limit.
        limit = re.search(r"value <= (\d+)", str(error))
        found = f"it supports at most {limit.group(1)} pieces" if limit else str(error).strip() or repr(error)
        raise RecipeError(
            f"SentencePiece cannot train a vocabulary of {config['vocab_size']} on this text: {found}. "
            "Lower tokenizer.vocab_size or add text"
        ) from error
    return model.getvalue()


def to_fast(processor: spm.SentencePieceProcessor) -> PreTrainedTokenizerFast:
    """The same Unigram model as a fast tokenizer: identical ids and lossless decoding, with <s> put before a
    text.

    Loads with AutoTokenizer alone. Special-token strings inside a text are a rule of their own, see
    `encode_text`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors

    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.vocab_size())]
    fast = Tokenizer(models.Unigram(pieces, unk_id=1, byte_fallback=True))
    fast.normalizer = normalizers.Replace(Regex(" "), "▁")
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 2)]
    )
    pad, unk, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token=pad,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of a text that is only text: no <s> in front, and ``</s>``, ``<0xE5>`` and their like are spelt
    out.

    The class would turn such a string into the control or byte token; cutting it after its first character
    prevents that.
    """
    parts = re.split(rf"(?<=<)(?={'|'.join(token[1:] for token in SPECIAL_TOKENS)}|0x[0-9A-F]{{2}}>)", text)
    return [i for part in parts if part for i in tokenizer(part, add_special_tokens=False)["input_ids"]]


def parity(
    processor: spm.SentencePieceProcessor, fast: PreTrainedTokenizerFast, texts: list[str]
) -> dict[str, Any]:
    """Compare ids and round trips over `texts` and the hard cases, text by text.

    Two kinds of text differ by nature and are counted apart: those holding U+2581, which stands for a space
    inside SentencePiece, and those holding the literal spelling of a special or byte token. Raises
    RecipeError with the first text whose ids differ or that does not come back as it was.
    """
    cases = [*HARD_CASES, *texts]
    literal = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)) + "|<0x[0-9A-F]{2}>")
    report = {
        "texts": len(cases),
        "identical_ids": 0,
        "lossless": 0,
        "with_u2581": 0,
        "with_literal_special_tokens": 0,
    }
    for case in cases:
        if "▁" in case:
            report["with_u2581"] += 1
            continue
        if literal.search(case):
            report["with_literal_special_tokens"] += 1
            if fast.decode(encode_text(fast, case)) != case:
                raise RecipeError(f"parity gate: a literal special token does not come back: {case[:200]!r}")
            continue
        ids = processor.encode(case)
        mine = fast(case, add_special_tokens=False)["input_ids"]
        if ids != mine:
            raise RecipeError(
                f"parity gate: SentencePiece and the fast tokenizer disagree on {case[:200]!r}: "
                f"{ids[:20]} and {mine[:20]}"
            )
        report["identical_ids"] += 1
        if fast.decode(mine) != case:
            raise RecipeError(
                f"parity gate: the round trip changes {case[:200]!r} into {fast.decode(mine)[:200]!r}"
            )
        report["lossless"] += 1
    return report


def compression(processor: spm.SentencePieceProcessor, texts: list[str], threads: int) -> dict[str, float]:
    """Bytes and characters per token (no control tokens counted) and the share of byte-fallback tokens."""
    ids = processor.encode(texts, num_threads=threads)
    tokens = sum(map(len, ids))
    byte_pieces = {i for i in range(processor.vocab_size()) if processor.is_byte(i)}
    # A line end is always a byte token by design; it says nothing about coverage.
    byte_pieces.discard(processor.piece_to_id("<0x0A>"))
    fallback = sum(i in byte_pieces for document in ids for i in document)
    return {
        "tokens": tokens,
        "bytes_per_token": sum(len(text.encode()) for text in texts) / max(1, tokens),
        "characters_per_token": sum(map(len, texts)) / max(1, tokens),
        "byte_fallback_rate": fallback / max(1, tokens),
    }


def save(folder: Path, model: bytes, fast: PreTrainedTokenizerFast) -> None:
    """Write ``spm.model`` and the Hugging Face files into a folder."""
    (folder / "spm.model").write_bytes(model)
    fast.save_pretrained(folder)
