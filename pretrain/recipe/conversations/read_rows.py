"""A user's own conversations, from JSON files or from a data set on the Hugging Face hub or in a folder.

The columns of a row decide its form:

==========================================  ==========================================================
columns                                     form
==========================================  ==========================================================
instruction, output; input if there is one  Alpaca (e.g. databricks-dolly-15k-ja)
messages: a list of role and content        chat
conversations: a list of from and value     chat as in ShareGPT (e.g. oasst1-21k-ja)
message_id, parent_id, role, text_ja, text  a tree of replies, one row a message (e.g. oasst1-89k-ja)
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
Row = tuple[str, dict[str, Any]]  # its file and line (for error messages), and its columns
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
ROW_FORMS = (
    "instruction and output (Alpaca), messages or conversations (chat), or message_id, parent_id, role and "
    "text (trees of replies)"
)


def read_rows(where: str, spec: dict[str, Any]) -> Iterator[Row]:
    """The rows of an entry with a `path` or a `dataset`.

    where: names the entry in messages, such as ``instruction.json: pairs.mine``. Raises RecipeError when a
    file or data set cannot be read, or when a row is not an object.
    """
    if "path" in spec:
        for path in expand_pairs(where, spec["path"]):
            for position, row in json_rows(path):
                if not isinstance(row, dict):
                    raise RecipeError(f"{path}: {position}: expected an object, found {type(row).__name__}")
                yield f"{path}: {position}", row
    else:
        yield from _hub_rows(where, spec)


def expand_pairs(where: str, pattern: str) -> list[Path]:
    """The files that the `path` of an entry matches. Raises RecipeError when it matches none."""
    paths = sorted(glob_files(pattern))
    if not paths:
        raise RecipeError(f"{where}.path: {pattern!r} matches no file (relative paths start at {ROOT})")
    return paths


def byte_order_marks(where: str, spec: dict[str, Any]) -> int:
    """How many files of an entry begin with a byte order mark, which `read_rows` removes."""
    found = 0
    for path in expand_pairs(where, spec["path"]) if "path" in spec else []:
        with path.open("rb") as handle:
            found += handle.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
    return found


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a JSON list or of JSON Lines, each with its position, such as ``line 3``.

    A byte order mark is removed. Raises RecipeError that names the line with invalid JSON or the bad byte.
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
    """The conversations of rows; a tree of replies gives one conversation.

    In a tree, each message is followed by its reply of the best rank, or by the first one if there are no
    ranks. Raises RecipeError that names the row when its columns have no known form.
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
            return chat_messages(f"{where}: {column}", row[column], role, content)
    for key in ("instruction", "output"):
        if key not in row:
            raise RecipeError(f"{where}: no column {key!r}; it has {sorted(row)}. Expected {ROW_FORMS}")
    instruction, given = _text(where, row, "instruction"), _text(where, row, "input")
    return [
        {"role": "user", "content": user_message(instruction, given)},
        {"role": "assistant", "content": _text(where, row, "output")},
    ]


def chat_messages(where: str, messages: Any, role: str = "role", content: str = "content") -> list[Message]:
    """Messages with our names of roles.

    where: the row, for messages. role, content: the keys of a message. Raises RecipeError that names the
    faulty message.
    """
    if not isinstance(messages, list):
        raise RecipeError(f"{where}: {type(messages).__name__}, expected a list of messages")
    found = []
    for number, message in enumerate(messages, 1):
        here = f"{where}: message {number}"
        if not isinstance(message, dict) or not {role, content} <= message.keys():
            raise RecipeError(f"{here}: expected an object with {role} and {content}")
        if message[role] not in ROLES:
            raise RecipeError(f"{here}: {role} {message[role]!r}, expected one of {', '.join(ROLES)}")
        found.append({"role": ROLES[message[role]], "content": _text(here, message, content)})
    return found


def _text(where: str, row: dict[str, Any], key: str) -> str:
    """The text of a column; empty when it is null or missing."""
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RecipeError(f"{where}: {key}: {type(value).__name__}, expected a string")
    return value


def _best_replies(rows: list[Row]) -> Iterator[list[Message]]:
    """One conversation from each first message of a tree."""
    # By parent: rank, position in the file, message.
    replies: dict[Any, list[tuple[float, int, dict[str, Any]]]] = {}
    for position, (where, row) in enumerate(rows):
        if row["role"] not in ROLES:
            raise RecipeError(f"{where}: role {row['role']!r}, expected one of {', '.join(ROLES)}")
        rank = row.get("rank")
        replies.setdefault(row["parent_id"] or None, []).append(
            (float("inf") if rank is None else rank, position, row)
        )
    for _, _, root in sorted(replies.get(None, []), key=lambda reply: reply[1]):
        thread = [root]
        while following := replies.get(thread[-1]["message_id"]):
            thread.append(min(following, key=lambda reply: reply[:2])[2])
        yield [
            {"role": ROLES[row["role"]], "content": row.get("text_ja") or row.get("text") or ""}
            for row in thread
        ]
