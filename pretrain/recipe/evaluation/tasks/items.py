"""The items of tasks: four-choice questions from the packaged sources, and the files of published tasks.

The model was not trained on what a packaged task asks. Stage 06 asks about documents of the validation side
of pretraining, without answers that also occur on the training side. Stage 14 asks about pairs of the
validation side of stage 11, whose headwords tuning has not seen. No stage trains on the dictionary that
``reading`` uses; its words are split by their hash anyway.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from recipe.config.tasks import brings_data
from recipe.conversations.instructions import messages_of
from recipe.conversations.read_rows import json_rows
from recipe.corpus.archives import tar_members
from recipe.corpus.normalizing import make_normalizer
from recipe.corpus.packaged import read_tatoeba
from recipe.corpus.shards import read_texts
from recipe.corpus.splitting import is_valid_side, text_hash
from recipe.evaluation.tasks.files import files_of
from recipe.project import DATA, RecipeError, write_json_lines

Item = dict[str, Any]
Row = tuple[Item, str]  # the values that a question is made from, and its answer

WRONG, DRAWN = 3, 24  # wrong choices, and how many answers of other questions they are selected from
SHOTS = 100  # items of a training file that the shots are selected from
LABELS = {"jnli": ("entailment", "contradiction", "neutral"), "marc-ja": ("positive", "negative")}

LETTERS = ("A", "B", "C", "D")
MMLU_SHOTS = 5  # of the same subject, as MMLU (Hendrycks et al., 2021) asks

_PRONOUN = re.compile(r"\[([^]]*)\]\([^)]*\)")
_SUBJECT = re.compile(r"^[^/]+/JMMLU(?:_NC_ND)?/\w+\.csv$")
# The normaliser may have removed the space before the dash. After the hyphen of a name is a letter or digit.
_COMMAND = re.compile(r"名前\n(\S.*?)(?: [-–—]|[-–—](?![A-Za-z0-9])) ?(\S.*)")
_PACKAGE = re.compile(r"(\S+) - ?(\S[^\n]*)\n(.+)", re.DOTALL)


def write_tasks(
    config: dict[str, Any], dataset: Path, folder: Path, names: Iterable[str], not_asked: Counter[str]
) -> list[Item]:
    """Write the items of tasks of evaluation.json, and return what `load_tasks` needs of each.

    config: a whole recipe. dataset: the folder of stage 02. folder: where ``<task>.test.jsonl`` goes, and
    ``<task>.train.jsonl`` for the shots. Nothing is written for a task that brings its own data. not_asked:
    gets the number of questions of each task that `four_choice` has left out. Raises RecipeError for a task
    without enough items.
    """
    normalize = make_normalizer(config["dataset"])
    most = config["evaluation"].get("items_per_task")
    tasks = []
    for name in names:
        spec = config["evaluation"]["tasks"][name]
        if brings_data(name):
            tasks.append({"task": name} | spec)
            continue
        if "source" in spec:
            items, not_asked[name] = packaged_items(name, spec["source"], dataset, normalize, most)
            sides = {"test": items}
        else:
            read = _READERS_OF_FILES.get(name, read_jglue)
            sides = {s: list(read(name, path, normalize)) for s, path in files_of(name, spec).items()}
            sides["test"] = in_hash_order(sides["test"])[:most]
            if "train" in sides:
                sides["train"] = sides["train"][:SHOTS]
        if not all(sides.values()):
            raise RecipeError(f"evaluation.json: tasks.{name}: its files hold no items. Remove the task")
        tasks.append({"task": name} | write_items(folder, name, sides))
    return tasks


def write_items(folder: Path, name: str, sides: dict[str, list[Item]]) -> Item:
    """Write items as JSON Lines, and return the values of the YAML file that make the harness read them.

    sides: items by ``test`` and ``train``. The cache of datasets is then below `folder` as well.
    """
    folder.mkdir(exist_ok=True)
    paths = {side: folder / f"{name}.{side}.jsonl" for side in sides}
    for side, path in paths.items():
        write_json_lines(path, sides[side])
    files = {side: str(path) for side, path in paths.items()}
    return {"dataset_kwargs": {"data_files": files, "cache_dir": str(folder / ".cache")}}


def in_hash_order(items: Iterable[Item]) -> list[Item]:
    """Items in the order of their hashes, so that the first ones are a random sample."""
    return sorted(items, key=lambda item: text_hash(json.dumps(item, ensure_ascii=False, sort_keys=True)))


# ---------------------------------------------------------------------------------------- packaged questions


def packaged_items(
    name: str,
    source: str,
    dataset: Path,
    normalize: Callable[[str], str],
    most: int | None,
) -> tuple[list[Item], int]:
    """The four-choice questions of a packaged task, and how many are left out.

    dataset: the folder of stage 02; source: in dataset.json. Raises RecipeError when the answers that were
    held out make no question.
    """
    if name == "reading":
        rows = [row for row in read_readings(DATA / source) if is_valid_side(text_hash(row[1]), 0.05)]
    else:
        readers = {"command-summary": _commands, "package-summary": _packages, "translation": _sentences}
        sides = [read_texts(dataset, side, source) for side in ("valid", "train")]
        held_out, seen = (list(readers[name](texts)) for texts in sides)
        if name == "translation":
            held_out = _translations(held_out, DATA / source, normalize)
        read = {answer for _, answer in seen}
        rows = [row for row in held_out if row[1] not in read]
    items, left_out = four_choice(rows, most)
    if not items:
        raise RecipeError(
            f"evaluation.json: tasks.{name}: {source!r} has {len({answer for _, answer in rows})} different "
            f"answers that were held out, expected {WRONG + 1} or more to different questions. Remove the "
            "task, or raise dataset.valid_share"
        )
    return items, left_out


def four_choice(rows: Iterable[Row], most: int | None) -> tuple[list[Item], int]:
    """Four-choice questions, the answer and three answers of other questions; and how many are left out.

    A question with several answers is asked once, and none of its answers is a wrong choice. Of `DRAWN`
    random answers of other questions, the three nearest in length to the right one become the wrong choices,
    so that the length does not give the answer away. Where fewer than three of the drawn ones are wrong, all
    answers count as drawn. The random choice depends only on the question and the answers.

    Each item has the keys of its row, ``choices``, and ``answer``, the index of the right choice. most: the
    number of questions to make, the first by their hash. A question is left out when fewer than three
    answers are wrong.
    """
    right: dict[str, set[str]] = defaultdict(set)
    for item, answer in rows:
        right[json.dumps(item, ensure_ascii=False)].add(answer)
    answers = sorted(set().union(*right.values()))
    items, left_out = [], 0
    for key in sorted(right, key=text_hash)[:most]:
        draw = random.Random(text_hash(key))
        answer = min(right[key])
        drawn = draw.sample(answers, min(len(answers), DRAWN + 1))
        others = [other for other in drawn if other not in right[key]]
        if len(others) < WRONG:
            others = [other for other in answers if other not in right[key]]
        if len(others) < WRONG:
            left_out += 1
            continue
        wrong = sorted(others, key=lambda other: abs(len(other) - len(answer)))[:WRONG]
        choices = [answer, *wrong]
        draw.shuffle(choices)
        items.append(json.loads(key) | {"choices": choices, "answer": choices.index(answer)})
    return items, left_out


def _commands(texts: Iterable[str]) -> Iterator[Row]:
    """Manual pages: the names and the summary of the first section."""
    for text in texts:
        if match := _COMMAND.match(text):
            yield {"name": match[1]}, match[2]


def _packages(texts: Iterable[str]) -> Iterator[Row]:
    """Package descriptions: the body and the one-line summary."""
    for text in texts:
        if match := _PACKAGE.match(text):
            yield {"body": match[3]}, match[2]


def _sentences(texts: Iterable[str]) -> Iterator[Row]:
    """The lines of documents."""
    for text in texts:
        yield from (({}, line) for line in text.split("\n"))


def _translations(rows: list[Row], folder: Path, normalize: Callable[[str], str]) -> list[Row]:
    """Japanese sentences of `rows` with their English translation."""
    asked = {line for _, line in rows}
    pairs = ((english, normalize(japanese)) for _, japanese, english in read_tatoeba(folder) if english)
    return [({"english": normalize(english)}, japanese) for english, japanese in pairs if japanese in asked]


def read_readings(folder: Path) -> Iterator[Row]:
    """Words and readings of JMdict: common words of two kanji or more with one reading, in hiragana.

    JMdict: CC BY-SA 4.0, Electronic Dictionary Research and Development Group. folder: of the source
    `tatoeba`, whose archive contains the dictionary. It is read line by line, in constant memory. Raises
    RecipeError for an archive without it.
    """
    (archive,) = folder.glob("*.tar.gz")
    with gzip.open(archive) as handle:
        for _, packed in tar_members(handle, archive, re.compile(r"/res/jmdict/jmdict\.xml\.gz$")):
            with gzip.open(io.BytesIO(packed), "rt", encoding="utf-8") as lines:
                yield from _readings(lines)
            return
    raise RecipeError(f"{archive}: contains no res/jmdict/jmdict.xml.gz. Remove the task `reading`")


def _readings(lines: Iterable[str]) -> Iterator[Row]:
    word, common, readings = "", False, []
    for line in lines:
        if line.startswith("<keb>"):
            word = word or line[5:].removesuffix("</keb>\n")
        elif line.startswith(("<ke_pri>ichi1", "<ke_pri>news1", "<ke_pri>spec1")):
            common = True
        elif line.startswith("<reb>"):
            readings.append(line[5:].removesuffix("</reb>\n"))
        elif line.startswith("</entry>"):
            alone = len(readings) == 1 and re.fullmatch("[ぁ-ゖー]+", readings[0])
            if common and alone and re.fullmatch("[一-鿿々]{2,}", word):
                yield {"word": word}, readings[0]
            word, common, readings = "", False, []


# -------------------------------------------------------------------------------------------- held-out pairs


def held_out_items(
    rows: Iterable[dict[str, Any]],
    context: Callable[[list[dict[str, str]]], str],
    most: int | None,
) -> tuple[list[Item], int]:
    """The pairs of stage 11's validation side as four-choice questions; of each source up to `most`, by hash.

    Also returns how many questions are left out because too few answers are wrong.

    rows: the pairs as stage 11 wrote them; the turns before a pair belong to its question. context: turns
    a conversation into a context of the harness. Where pairs have an input, the wrong choices
    are answers to the same instruction; to others of the source, where an instruction occurs only once.
    """
    kinds: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        kind = (row["source"], row["instruction"] if row["input"] else "")
        item = {"conversation": context(messages_of(row)[:-1]), "source": row["source"]}
        kinds[kind].append((item, row["output"]))
    for source, instruction in list(kinds):
        if instruction and len(kinds[source, instruction]) == 1:
            kinds[source, ""] += kinds.pop((source, instruction))
    asked: dict[str, list[Item]] = defaultdict(list)
    left_out = 0
    for (source, _), found in sorted(kinds.items()):
        items, without = four_choice(found, None)
        asked[source] += items
        left_out += without
    return [item for items in asked.values() for item in sorted(items, key=_draw)[:most]], left_out


def _draw(item: Item) -> bytes:
    """The hash of a question, by which some of all kinds are chosen."""
    question = {key: item[key] for key in ("conversation", "source")}
    return text_hash(json.dumps(question, ensure_ascii=False))


# ------------------------------------------------------------------------------------------------------ JGLUE


def read_jglue(name: str, path: Path, normalize: Callable[[str], str]) -> Iterator[Item]:
    """The items of a file of JGLUE, their texts normalised as the training text was.

    Raises RecipeError naming the file and line for a row of another form.
    """
    for line, row in json_rows(path):
        try:
            for item in _questions(row) if name == "jsquad" else [_READERS[name](row)]:
                yield _normalized(item, normalize)
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise RecipeError(
                f"{path}: {line}: not a row of {name}: {type(error).__name__} {error}. "
                "Expected the form of JGLUE"
            ) from error


def _commonsense(row: dict[str, Any]) -> Item:
    choices = [row[f"choice{i}"] for i in range(5)]
    choices[row["label"]]
    return {"question": row["question"], "choices": choices, "answer": row["label"]}


def _inference(row: dict[str, Any]) -> Item:
    answer = LABELS["jnli"].index(row["label"])
    return {"premise": row["sentence1"], "hypothesis": row["sentence2"], "answer": answer}


def _review(row: dict[str, Any]) -> Item:
    return {"review": row["sentence"], "answer": LABELS["marc-ja"].index(row["label"])}


_READERS = {"jcommonsenseqa": _commonsense, "jnli": _inference, "marc-ja": _review}


def _questions(file: dict[str, Any]) -> Iterator[Item]:
    """The questions of a file in the form of SQuAD. The title and ``[SEP]`` before a context are removed."""
    for article in file["data"]:
        for paragraph in article["paragraphs"]:
            context = paragraph["context"].partition("[SEP]")[2] or paragraph["context"]
            for question in paragraph["qas"]:
                if not question["answers"]:
                    raise ValueError(f"no answer to {question['question']}")
                yield {
                    "title": article["title"],
                    "context": context,
                    "question": question["question"],
                    "answers": [answer["text"] for answer in question["answers"]],
                }


def _normalized(item: Item, normalize: Callable[[str], str]) -> Item:
    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(inner) for inner in value]
        return normalize(value).strip() if isinstance(value, str) else value

    return {key: clean(value) for key, value in item.items()}


# ------------------------------------------------------------------------------------- Japanese COPA, JMMLU


def read_copa(name: str, path: Path, normalize: Callable[[str], str]) -> Iterator[Item]:
    """The test set of Japanese COPA: the questions 501 to 1000; ``[彼女](ランナー)`` reads as the pronoun.

    Raises RecipeError naming the file and line for a row of another form.
    """
    for line, row in json_rows(path):
        try:
            if row["id"] <= 500:
                continue
            texts = [_PRONOUN.sub(r"\1", row[key]) for key in ("premise", "answer1", "answer2")]
            item = {"premise": texts[0], "choices": texts[1:], "answer": (1, 2).index(row["correct_answer"])}
            if row["asks_for"] not in ("原因", "結果"):
                raise ValueError(f"asks_for: {row['asks_for']!r}")
            item["asks_for"] = row["asks_for"]
        except (KeyError, ValueError, TypeError) as error:
            raise RecipeError(
                f"{path}: {line}: not a row of {name}: {type(error).__name__} {error}. "
                "Expected the form of COPA-ja.jsonl"
            ) from error
        yield _normalized(item, normalize)


def read_jmmlu(name: str, path: Path, normalize: Callable[[str], str]) -> Iterator[Item]:
    """The questions of JMMLU, without the first five of each subject: these are the shots of the others.

    path: the repository as a tar archive: a CSV file per subject, of question, four choices and a letter.
    Raises RecipeError naming the file and row for a row of another form.
    """
    with gzip.open(path) as handle:
        for file, content in tar_members(handle, path, _SUBJECT):
            try:
                rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig"))))
            except (UnicodeDecodeError, csv.Error) as error:
                raise RecipeError(f"{path}: {file}: not CSV in UTF-8: {error}") from error
            for number, row in enumerate(rows, 1):
                if len(row) != 6 or row[5].strip() not in LETTERS:
                    raise RecipeError(
                        f"{path}: {file}: row {number}: not a row of {name}: expected a question, four "
                        f"choices and one of {', '.join(LETTERS)}, found {len(row)} columns, the last one "
                        f"{row[-1:]}"
                    )
            asked = [(_four_lines(row[:5], normalize), row[5].strip()) for row in rows]
            shots = "".join(f"{question}{letter}\n\n" for question, letter in asked[:MMLU_SHOTS])
            subject = Path(file).stem
            for question, letter in asked[MMLU_SHOTS:]:
                yield {
                    "subject": subject,
                    "shots": shots,
                    "question": question,
                    "answer": LETTERS.index(letter),
                }


def _four_lines(texts: list[str], normalize: Callable[[str], str]) -> str:
    """A question of JMMLU with its choices on lines of their own, up to the answer."""
    question, *choices = (normalize(text).strip() for text in texts)
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
    return "\n".join([f"質問:{question}", *lines, "答え:"])


_READERS_OF_FILES = {"copa-ja": read_copa, "jmmlu": read_jmmlu}
