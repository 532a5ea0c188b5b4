"""Rows as conversations: Alpaca, chat, ShareGPT and trees of replies.

The columns of a row decide its form:

==========================================  ==========================================================
columns                                     form
==========================================  ==========================================================
instruction, output; input if there is one  Alpaca (e.g. databricks-dolly-15k-ja)
messages: a list of role and content        chat
conversations: a list of from and value     chat as in ShareGPT (e.g. oasst1-21k-ja)
conversations: a list of role and content   chat (e.g. magpie-sft-v1.0)
message_id, parent_id, role, text_ja, text  a tree of replies, one row a message (e.g. oasst1-89k-ja)
==========================================  ==========================================================

In all but trees, the columns ``system`` (or ``system_prompt``) and ``history`` are what was said before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator
from typing import Any, NamedTuple

from recipe.config.chat_templates import user_message
from recipe.conversations.read_rows import Message, Row
from recipe.project import RecipeError

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
SYSTEM = ("system", "system_prompt")
BEFORE = (*SYSTEM, "history")  # the columns of what was said before
# Whether an answer is trained: as a column for all answers of a row, or as a key of a message.
ROW_MARKS = ("weight", "train", "loss_mask")
MARKS = (*ROW_MARKS, "training", "loss")
TREE = ("message_id", "parent_id", "role", "text_ja", "text", "rank")
# They change what the right answer is, but the chat templates cannot show them to the model.
UNSUPPORTED = (
    *("tools", "functions", "tool_calls", "function_call"),
    *("image", "images", "video", "videos", "audio", "audios"),
)


class Dialogue(NamedTuple):
    """A conversation as its row has it. dropped: why it cannot be used; empty if it can."""

    messages: list[Message]
    dropped: str = ""


def read_dialogues(rows: Iterable[Row], unused: Counter[str]) -> Iterator[Dialogue]:
    """The conversations of rows; a tree of replies gives one conversation.

    unused: gets the names of the columns that are not read, with the number of rows that have a value in
    them. In a tree, each message is followed by its reply of the best rank, or by the first one if there are
    no ranks. Raises RecipeError that names the row when its columns have no known form, or when a column has
    a value that is not supported.
    """
    tree: list[Row] = []
    for where, row in rows:
        if {"message_id", "parent_id", "role"} <= row.keys():
            check_columns(where, row, (*TREE, *ROW_MARKS), unused)
            tree.append((where, row))
        else:
            yield Dialogue(_dialogue(where, row, unused))
    yield from _best_replies(tree)


def _dialogue(where: str, row: dict[str, Any], unused: Counter[str]) -> list[Message]:
    for column in ("messages", "conversations"):
        if column in row:
            check_columns(where, row, (column, *BEFORE, *ROW_MARKS), unused)
            turns = chat_messages(f"{where}: {column}", row[column], unused, *_keys(column, row[column]))
            break
    else:
        for key in ("instruction", "output"):
            if key not in row:
                raise RecipeError(f"{where}: no column {key!r}; it has {sorted(row)}. Expected {ROW_FORMS}")
        check_columns(where, row, ("instruction", "input", "output", *BEFORE, *ROW_MARKS), unused)
        question = user_message(text_of(where, row, "instruction"), text_of(where, row, "input"))
        answer = {"role": "assistant", "content": text_of(where, row, "output")}
        turns = [{"role": "user", "content": question}, answer]
    # A list has values for the messages of the row, and none for those of the history.
    for_all = {key: row.get(key) for key in ROW_MARKS if not isinstance(row.get(key), list)}
    before = _marked(where, for_all, said_before(where, row, unused))
    return prepend(before, _marked(where, row, turns))


def _keys(column: str, messages: Any) -> tuple[str, str]:
    """The keys of the messages of a column: those of ShareGPT in `conversations`, unless it has role."""
    first = messages[0] if isinstance(messages, list) and messages else None
    if column == "conversations" and not (isinstance(first, dict) and "role" in first):
        return "from", "value"
    return "role", "content"


def said_before(where: str, row: dict[str, Any], unused: Counter[str]) -> list[Message]:
    """The messages of the columns BEFORE of a row: the system messages, then the history.

    The history is a list of ``[question, answer]``, or of messages. unused: see `chat_messages`. Raises
    RecipeError for another form.
    """
    texts = [text_of(where, row, column) for column in SYSTEM]
    messages = [{"role": "system", "content": text} for text in texts if not is_empty(text)]
    history = row.get("history")
    if is_empty(history):
        return messages
    where = f"{where}: history"
    if isinstance(history, list) and isinstance(history[0], dict):
        keys = ("from", "value") if "from" in history[0] else ("role", "content")
        return messages + chat_messages(where, history, unused, *keys)
    for number, turn in enumerate(history if isinstance(history, list) else [history], 1):
        if not isinstance(turn, list) or len(turn) != 2:
            raise RecipeError(
                f"{where}: entry {number}: {turn!r}, expected [question, answer], or a message with role and "
                "content"
            )
        for role, text in zip(("user", "assistant"), turn, strict=True):
            messages.append(
                {"role": role, "content": text_of(f"{where}: entry {number}", {role: text}, role)}
            )
    return messages


def prepend(before: list[Message], turns: list[Message]) -> list[Message]:
    """Messages with those of `said_before` in front; a system message that begins `turns` stays in front.

    A history that `turns` repeats is there once. White space around the messages does not count.
    """
    systems = [message for message in before if message["role"] == "system"]
    first = 1 if turns and turns[0]["role"] == "system" else 0
    history, rest = before[len(systems) :], turns[first:]
    said, repeated = (
        [(message["role"], message["content"].strip()) for message in messages]
        for messages in (history, rest[: len(history)])
    )
    return [*systems, *turns[:first], *([] if said == repeated else history), *rest]


def _role(where: str, key: str, value: Any) -> str:
    """The role that is written under a key, by its name here. Raises RecipeError for any other value."""
    if not isinstance(value, str) or value not in ROLES:
        raise RecipeError(f"{where}: {key} {value!r}, expected one of {', '.join(ROLES)}")
    return ROLES[value]


def chat_messages(
    where: str, messages: Any, unused: Counter[str], role: str = "role", content: str = "content"
) -> list[Message]:
    """Messages with our names of roles, and ``trained`` False for answers that are only context.

    where: the row and column, for error messages. unused: gets the keys of messages that are not read. role,
    content: the keys of a message. Raises RecipeError that names the faulty message.
    """
    if not isinstance(messages, list):
        raise RecipeError(f"{where}: {type(messages).__name__}, expected a list of messages")
    column = where.rpartition(": ")[2]
    ignored: Counter[str] = Counter()
    found = []
    for number, message in enumerate(messages, 1):
        here = f"{where}: message {number}"
        if not isinstance(message, dict) or not {role, content} <= message.keys():
            raise RecipeError(f"{here}: expected an object with {role} and {content}")
        speaker = _role(here, role, message[role])
        check_columns(here, message, (role, content, *MARKS), ignored)
        turn: Message = {"role": speaker, "content": text_of(here, message, content)}
        if turn["role"] == "assistant" and not is_trained(here, message, MARKS):
            turn["trained"] = False
        found.append(turn)
    unused.update(f"{column}[].{key}" for key in ignored)
    return found


def check_columns(where: str, row: dict[str, Any], used: Container[str], unused: Counter[str]) -> None:
    """Count the columns of a row that have a value but are not read.

    used: the columns that are read. Raises RecipeError for a column of UNSUPPORTED that has a value.
    """
    for column, value in row.items():
        if column in used or is_empty(value):
            continue
        if column in UNSUPPORTED:
            raise RecipeError(
                f"{where}: {column}: {str(value)[:60]!r}, expected no value: the answer depends on it, but "
                "it is not supported. Remove such rows, or remove the column if the answers do not need it"
            )
        unused[column] += 1


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, NaN, a blank text, an empty list or object, also as JSON text."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, list):
        return all(map(is_empty, value))
    return value is None or value == {} or value != value


def _marked(where: str, row: dict[str, Any], turns: list[Message]) -> list[Message]:
    """The messages of a row, with its columns ROW_MARKS applied to its answers."""
    mask = row.get("loss_mask")
    if not isinstance(mask, list):
        mask = [mask] * len(turns)
    if len(mask) != len(turns):
        raise RecipeError(
            f"{where}: loss_mask: {len(mask)} values for {len(turns)} messages, expected one for each message"
        )
    marked = []
    for turn, value in zip(turns, mask, strict=True):
        trained = is_trained(where, row | {"loss_mask": value}, ROW_MARKS)
        context = turn["role"] == "assistant" and not trained
        marked.append(turn | {"trained": False} if context else turn)
    return marked


def is_trained(where: str, values: dict[str, Any], marks: Iterable[str]) -> bool:
    """Whether no mark of a row or message is 0 or false.

    Raises RecipeError for a mark that is neither 0 (false) nor 1 (true) nor null.
    """
    found = {key: values[key] for key in marks if not is_empty(values.get(key))}
    for key, value in found.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RecipeError(
                f"{where}: {key}: {value!r}, expected 0 or 1 (false or true): whether the answer is trained. "
                "Change the value, or remove the key"
            )
    return all(found.values())


def text_of(where: str, row: dict[str, Any], key: str) -> str:
    """The text of a column; empty when it is null, NaN or missing. Raises RecipeError for another type."""
    value = row.get(key)
    if value is None or value != value:
        return ""
    if not isinstance(value, str):
        raise RecipeError(f"{where}: {key}: {type(value).__name__}, expected a string")
    return value


def _best_replies(rows: list[Row]) -> Iterator[Dialogue]:
    """One conversation from each first message of a tree.

    A message whose parent is missing gives a dropped one; the replies below it belong to that one.
    """
    parents = _parents(rows)
    # By parent: rank, position in the file, id, message.
    replies: dict[Any, list[tuple[float, int, Any, Message]]] = {}
    for position, (where, row) in enumerate(rows):
        role = _role(where, "role", row["role"])
        rank = float("inf") if is_empty(row.get("rank")) else row["rank"]
        if not isinstance(rank, int | float):
            raise RecipeError(f"{where}: rank: {rank!r}, expected a number")
        text = text_of(where, row, "text_ja") or text_of(where, row, "text")
        (message,) = _marked(where, row, [{"role": role, "content": text}])
        name = row["message_id"]
        replies.setdefault(parents[name], []).append((rank, position, name, message))
    for first in replies.get(None, []):
        thread = [first]
        while following := replies.get(thread[-1][2]):
            thread.append(min(following, key=lambda reply: reply[:2]))
        yield Dialogue([message for *_, message in thread])
    for parent, orphans in replies.items():
        if parent is not None and parent not in parents:
            yield from (Dialogue([], "parent missing") for _ in orphans)


def _parents(rows: list[Row]) -> dict[Any, Any]:
    """The parent's id by the id of each message of a tree; None for a first message.

    Raises RecipeError for an id that is missing or not unique, and for a message that is its own ancestor.
    """
    lines: dict[Any, str] = {}
    parents: dict[Any, Any] = {}
    for where, row in rows:
        name, parent = row["message_id"], None if is_empty(row["parent_id"]) else row["parent_id"]
        for key, value in (("message_id", name), ("parent_id", parent)):
            if not isinstance(value, str | int | float) and (key, value) != ("parent_id", None):
                raise RecipeError(f"{where}: {key}: {value!r}, expected a text or a number")
        if is_empty(name):
            raise RecipeError(f"{where}: message_id: {name!r}, expected a text or a number")
        if name in lines:
            raise RecipeError(
                f"{where}: message_id: {name!r} is also the id of {lines[name]}. Expected a different one "
                "for each message: remove one of the two"
            )
        lines[name], parents[name] = where, parent
    checked: set[Any] = set()
    for start in parents:
        above: set[Any] = set()
        here = start
        while here in parents and here not in checked:
            if here in above:
                raise RecipeError(
                    f"{lines[here]}: message_id {here!r} is its own ancestor: following parent_id from it "
                    "leads back to it. Correct the parent_id"
                )
            above.add(here)
            here = parents[here]
        checked |= above
    return parents
