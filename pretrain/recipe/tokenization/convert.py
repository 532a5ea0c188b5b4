"""Converts every kind of tokenizer into a fast Hugging Face tokenizer that AutoTokenizer loads."""

from __future__ import annotations

import json
from typing import Any

import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from recipe.project import RecipeError
from recipe.tokenization.encode_text import BYTE_TOKEN

# The score of control and byte tokens. SentencePiece never finds them in a text, but the fast class finds
# every token of its vocabulary. With this score, any other way to spell the text is better.
NEVER = -1000.0


def as_fast(
    tokenizer: Tokenizer, tokens: dict[str, str | None], segmenter: str | None = None
) -> PreTrainedTokenizerFast:
    """A fast tokenizer with these control tokens; ``bos_token``, if there is one, is put before every text.

    tokens: ``pad_token``, ``unk_token``, ``bos_token`` and ``eos_token``. Without a padding token, the end
    token is used: packing masks padding by position, not by id. The class is the general one, because
    AutoTokenizer would rebuild the class of a model family by other rules. Raises RecipeError for a token
    that is not in the vocabulary.
    """
    named = {key: token for key, token in tokens.items() if token is not None}
    for key, token in named.items():
        if tokenizer.token_to_id(token) is None:
            raise RecipeError(f"tokenizer.{key}: {token!r} is not in the vocabulary. Name a token that is")
    start = named.get("bos_token")
    tokenizer.post_processor = start and processors.TemplateProcessing(
        single=[start, "$A"],
        pair=[start, "$A", "$B"],
        special_tokens=[(start, tokenizer.token_to_id(start))],
    )
    named.setdefault("pad_token", named["eos_token"])
    extra = {"segmenter": segmenter} if segmenter else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **named,
        **extra,
    )


def from_sentencepiece(model: bytes) -> Tokenizer:
    """A SentencePiece Unigram or BPE model as a `Tokenizer` with the same ids, without control tokens.

    As in SentencePiece, U+2581 in a text reads as a space. The normalisation of the model is kept (NFKC,
    extra spaces, the space in front of the text). Raises RecipeError for the types WORD and CHAR.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    spec, rules = proto.trainer_spec, proto.normalizer_spec
    kinds = sentencepiece_model_pb2.TrainerSpec
    if spec.model_type == kinds.UNIGRAM:
        core = _unigram(proto)
    elif spec.model_type == kinds.BPE:
        core = _bpe(proto)
    else:
        raise RecipeError(
            f"SentencePiece model: type {kinds.ModelType.Name(spec.model_type)}, expected UNIGRAM or "
            "BPE. Use another tokenizer"
        )
    tokenizer = Tokenizer(core)
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    symbols = [
        p.piece
        for p in proto.pieces
        if p.type == sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
    ]
    tokenizer.add_tokens([AddedToken(symbol, normalized=False) for symbol in symbols])
    return tokenizer


def _unigram(proto: Any) -> models.Unigram:
    normal = sentencepiece_model_pb2.ModelProto.SentencePiece.NORMAL
    pieces = [(p.piece, p.score if p.type == normal else NEVER) for p in proto.pieces]
    return models.Unigram(pieces, unk_id=_unknown(proto), byte_fallback=proto.trainer_spec.byte_fallback)


def _bpe(proto: Any) -> models.BPE:
    """The merges are rebuilt: every way to join two tokens into a third, the best score first."""
    normal = sentencepiece_model_pb2.ModelProto.SentencePiece.NORMAL
    scores = {p.piece: p.score for p in proto.pieces if p.type == normal}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return models.BPE(
        {p.piece: i for i, p in enumerate(proto.pieces)},
        merges,
        unk_token=proto.pieces[_unknown(proto)].piece,
        byte_fallback=proto.trainer_spec.byte_fallback,
        fuse_unk=True,
    )


def _unknown(proto: Any) -> int:
    unknown = sentencepiece_model_pb2.ModelProto.SentencePiece.UNKNOWN
    return next(i for i, piece in enumerate(proto.pieces) if piece.type == unknown)


def sentencepiece_tokens(processor: spm.SentencePieceProcessor) -> dict[str, str | None]:
    """The control tokens of a SentencePiece model, ``pad_token`` and so on; None for an absent one."""
    ids = {"pad_token": processor.pad_id(), "unk_token": processor.unk_id()}
    ids |= {"bos_token": processor.bos_id(), "eos_token": processor.eos_id()}
    return {key: processor.id_to_piece(i) if i >= 0 else None for key, i in ids.items()}


def hide_control_tokens(tokenizer: Tokenizer, names: set[str]) -> Tokenizer:
    """A Unigram tokenizer that never encodes a text as a control or byte token, even if it spells its name.

    names: the control tokens. Other types are returned unchanged, because no merge gives such a token.
    """
    state = json.loads(tokenizer.to_str())
    if state["model"]["type"] != "Unigram":
        return tokenizer
    for entry in state["model"]["vocab"]:
        if entry[0] in names or BYTE_TOKEN.fullmatch(entry[0]):
            entry[1] = NEVER
    return Tokenizer.from_str(json.dumps(state))
