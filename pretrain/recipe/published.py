"""A published tokenizer, taken over as it is or extended by pieces learnt from Japanese text."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece as spm
from tokenizers import Tokenizer, models, trainers
from transformers import PreTrainedTokenizerFast

from recipe.config import round_up
from recipe.conversion import as_fast, from_sentencepiece, hide_control_pieces, sentencepiece_tokens
from recipe.outputs import ROOT, RecipeError
from recipe.tokenizer_training import JAPANESE, Trained, train_sentencepiece

FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "*.model", "vocab.*", "merges.txt"]
_RUN = re.compile(f"[{JAPANESE}]{{1,1000}}")


def find_published(name: str, revision: str | None = None, local_only: bool = False) -> Path:
    """The folder or SentencePiece file of a published tokenizer: a path, or a name on the hub.

    Of a name only tokenizer files are fetched, and no code. Raises RecipeError when it is neither.
    """
    path = Path(name).expanduser()
    path = path if path.is_absolute() else ROOT / path
    if path.exists():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=FILES, local_files_only=local_only)
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise RecipeError(
            f"tokenizer {name!r}: no folder or file of this name, and not to be had from the hub ({reason}). "
            "Give the path of a folder with tokenizer.json, or of a SentencePiece file"
        ) from error


def load_published(path: Path) -> tuple[Tokenizer, dict[str, str | None], bytes | None]:
    """A published tokenizer, its control tokens (``pad_token`` and so on), and its SentencePiece model if that
    is what there is.

    ``bos_token`` is None unless the published tokenizer itself puts it before a text. Reads tokenizer.json
    where there is one, else a SentencePiece file, else what AutoTokenizer makes of the folder.
    """
    folder = path if path.is_dir() else path.parent
    models_here = [path] if path.is_file() else sorted(path.glob("*.model"))
    tokens = _named_tokens(folder) if path.is_dir() else {}
    if path.is_dir() and (path / "tokenizer.json").is_file():
        core = Tokenizer.from_file(str(path / "tokenizer.json"))
    elif models_here:
        raw = models_here[0].read_bytes()
        try:
            processor = spm.SentencePieceProcessor(model_proto=raw)
        except RuntimeError as error:
            raise RecipeError(f"{models_here[0]}: not a SentencePiece model") from error
        tokens = {key: token for key, token in sentencepiece_tokens(processor).items() if token} | tokens
        return from_sentencepiece(raw), _known(tokens, processor.piece_to_id) | {"bos_token": None}, raw
    else:
        from transformers import AutoTokenizer

        try:
            core = AutoTokenizer.from_pretrained(path, trust_remote_code=False).backend_tokenizer
        except (OSError, ValueError, AttributeError) as error:
            raise RecipeError(
                f"{path}: no tokenizer.json, no SentencePiece file, and AutoTokenizer cannot load it ({error})"
            ) from error
    start = core.encode("").ids
    bos = tokens.get("bos_token")
    starts = bos is not None and start[:1] == [core.token_to_id(bos)]
    return core, tokens | {"bos_token": bos if starts else None}, None


def _known(tokens: dict[str, str | None], to_id: Any) -> dict[str, str | None]:
    return {key: token for key, token in tokens.items() if token is not None}


def _named_tokens(folder: Path) -> dict[str, str | None]:
    """The control tokens that a folder's own files name."""
    found: dict[str, str | None] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            values = json.loads((folder / name).read_text("utf-8"))
            for key in ("pad_token", "unk_token", "bos_token", "eos_token"):
                token = values.get(key)
                if token:
                    found[key] = token["content"] if isinstance(token, dict) else token
    return found
