"""Conversations of a user's own: from JSON files, or a data set on the Hugging Face hub or in a folder.

A row is taken by its columns:

==========================================  ==========================================================
columns                                     form
==========================================  ==========================================================
instruction, output; input if there is one  Alpaca (databricks-dolly-15k-ja, for one)
messages: a list of role and content        chat
conversations: a list of from and value     chat as ShareGPT writes it (oasst1-21k-ja, for one)
message_id, parent_id, role, text_ja, text  a tree of replies, a row a message (oasst1-89k-ja, for one)
==========================================  ==========================================================
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from recipe.config.chat_templates import user_message
from recipe.project import ROOT, RecipeError, glob_files

Message = dict[str, str]  # role (system, user or assistant) and content
Row = tuple[str, dict[str, Any]]  # where it stands, for messages to people, and its columns
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
FORMS = (
    "instruction and output (Alpaca), messages or conversations (chat), or message_id, parent_id, role and "
    "text (trees of replies)"
)


def read_rows(where: str, spec: dict[str, Any]) -> Iterator[Row]:
    """The rows of an entry with a `path` or a `dataset`.

    where: the entry, such as ``instruction.json: pairs.mine``. Raises RecipeError for what cannot be read.
    """
    if "path" in spec:
        for path in expand_pairs(where, spec["path"]):
            for place, row in json_rows(path):
                if not isinstance(row, dict):
                    raise RecipeError(f"{path}: {place}: wanted an object, found {type(row).__name__}")
                yield f"{path}: {place}", row
    else:
        yield from _hub_rows(where, spec)


def expand_pairs(where: str, pattern: str) -> list[Path]:
    """The files of an entry with a `path`. Raises RecipeError when there is none."""
    paths = sorted(glob_files(pattern))
    if not paths:
        raise RecipeError(f"{where}.path: {pattern!r} matches no file (from {ROOT})")
    return paths


def byte_order_marks(where: str, spec: dict[str, Any]) -> int:
    """How many files of an entry with a `path` begin with a byte order mark, which `read_rows` takes off."""
    found = 0
    for path in expand_pairs(where, spec["path"]) if "path" in spec else []:
        with path.open("rb") as handle:
            found += handle.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
    return found


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a JSON list, or of JSON Lines, and where each stands; a byte order mark is no part of
    either. Raises RecipeError naming the line at fault.
    """
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 at byte {error.start}. Save the file as UTF-8") from error
    is_list = text.lstrip().startswith("[")
    number = 1
    try:
        if is_list:
            yield from ((f"entry {i}", row) for i, row in enumerate(json.loads(text), 1))
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {number}", json.loads(line)
    except json.JSONDecodeError as error:
        line = error.lineno if is_list else number
        raise RecipeError(f"{path}:{line}: not valid JSON ({error.msg})") from error


def _hub_rows(where: str, spec: dict[str, Any]) -> Iterator[Row]:
    import datasets

    folder = ROOT / Path(spec["dataset"]).expanduser()
    source = str(folder) if folder.is_dir() else spec["dataset"]
    try:
        rows = datasets.load_dataset(
            source,
            name=spec.get("configuration"),
            split=spec.get("split", "train"),
            revision=spec.get("revision"),
            streaming=True,
        )
        for number, row in enumerate(rows):
            yield f"{spec['dataset']}: row {number}", row
    except (OSError, ValueError) as error:
        raise RecipeError(f"{where}: cannot read the data set {spec['dataset']}: {error}") from error


def read_dialogues(rows: Iterable[Row]) -> Iterator[list[Message]]:
    """The conversations of rows, each beginning with a system message or a user's.

    Of a tree of replies, one conversation: at each message the reply of the best rank, the first where there
    are no ranks. Raises RecipeError that names the row for columns of no known form.
    """
    tree: list[Row] = []
    for where, row in rows:
        if {"message_id", "parent_id", "role"} <= row.keys():
            tree.append((where, row))
        else:
            yield _dialogue(where, row)
    yield from _best_replies(tree)


def _dialogue(where: str, row: dict[str, Any]) -> list[Message]:
    for column, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        if column in row:
            return chat(f"{where}: {column}", row[column], role, content)
    for key in ("instruction", "output"):
        if key not in row:
            raise RecipeError(f"{where}: no column {key!r}; it has {sorted(row)}. Wanted {FORMS}")
    instruction, given = _text(where, row, "instruction"), _text(where, row, "input")
    return [
        {"role": "user", "content": user_message(instruction, given)},
        {"role": "assistant", "content": _text(where, row, "output")},
    ]


def chat(where: str, messages: Any, role: str = "role", content: str = "content") -> list[Message]:
    """Messages by the names of roles that data sets use. Raises RecipeError naming the message at fault."""
    if not isinstance(messages, list):
        raise RecipeError(f"{where}: {type(messages).__name__}, wanted a list of messages")
    found = []
    for number, message in enumerate(messages, 1):
        here = f"{where}: message {number}"
        if not isinstance(message, dict) or not {role, content} <= message.keys():
            raise RecipeError(f"{here}: wanted an object with {role} and {content}")
        if message[role] not in ROLES:
            raise RecipeError(f"{here}: {role} {message[role]!r}, wanted one of {', '.join(ROLES)}")
        found.append({"role": ROLES[message[role]], "content": _text(here, message, content)})
    return found


def _text(where: str, row: dict[str, Any], key: str) -> str:
    """A column's text; nothing where it is null or not there."""
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RecipeError(f"{where}: {key}: {type(value).__name__}, wanted a text")
    return value


def _best_replies(rows: list[Row]) -> Iterator[list[Message]]:
    replies: dict[Any, list[tuple[float, int, dict[str, Any]]]] = {}
    for place, (where, row) in enumerate(rows):
        if row["role"] not in ROLES:
            raise RecipeError(f"{where}: role {row['role']!r}, wanted one of {', '.join(ROLES)}")
        rank = row.get("rank")
        replies.setdefault(row["parent_id"] or None, []).append(
            (float("inf") if rank is None else rank, place, row)
        )
    for _, _, root in sorted(replies.get(None, []), key=lambda reply: reply[1]):
        thread = [root]
        while following := replies.get(thread[-1]["message_id"]):
            thread.append(min(following, key=lambda reply: reply[:2])[2])
        yield [
            {"role": ROLES[row["role"]], "content": row.get("text_ja") or row.get("text") or ""}
            for row in thread
        ]
