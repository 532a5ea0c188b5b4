"""The items of tasks: four-choice questions from the packaged sources, and JGLUE's files.

The model was not trained on what a packaged task asks. Stage 06 asks about documents of the validation side
of pretraining, without answers that also occur on the training side. Stage 14 asks about pairs of the
validation side of stage 11, whose headwords tuning has not seen. No stage trains on the dictionary that
``reading`` uses; its words are split by their hash anyway.
"""

from __future__ import annotations

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
from recipe.corpus.fetch import fetch
from recipe.corpus.normalizing import make_normalizer
from recipe.corpus.packaged import read_tatoeba
from recipe.corpus.shards import read_texts
from recipe.corpus.splitting import is_valid_side, text_hash
from recipe.project import DATA, ROOT, RecipeError, write_json_lines

Item = dict[str, Any]
Row = tuple[Item, str]  # the values that a question is made from, and its answer

WRONG, DRAWN = 3, 24  # wrong choices, and how many answers of other questions they are selected from
SHOTS = 100  # items of a training file that the shots are selected from
JGLUE_COMMIT = "6f071c09316baae89c3d083a90985b4b1cb9968c"  # release 1.3.0: the content cannot change
# The training files of jnli and jsquad have no hash here: only the commit identifies them.
JGLUE_SHA256 = {
    "jcommonsenseqa/train": "9b55fae5ecb3aedd6f8ce5bc09196c3b629864668ec6c18eee4d65c0aa48229e",
    "jcommonsenseqa/test": "0d8d76f3bfa0d174866939882faccdd01fbc2bcd5a76c43748ba0c40a7b3b8d4",
    "jnli/test": "ca0353efc7c2eebfb6de4e13f16295053c8b1ee65e7b0849190c90426fbc495f",
    "jsquad/test": "fb0a57a35281ff03bbe7f0e878cff5b577985fbe6fcb242e7e8ddb63d1c0ab11",
}
JGLUE = f"https://raw.githubusercontent.com/yahoojapan/JGLUE/{JGLUE_COMMIT}/datasets"
LABELS = {"jnli": ("entailment", "contradiction", "neutral"), "marc-ja": ("positive", "negative")}

_COMMAND = re.compile(r"名前\n(\S.*?) ?[-–—] ?(\S.*)")
_PACKAGE = re.compile(r"(\S+) - ?(\S[^\n]*)\n(.+)", re.DOTALL)


def write_tasks(config: dict[str, Any], dataset: Path, folder: Path, names: Iterable[str]) -> list[Item]:
    """Write the items of tasks of evaluation.json, and return what `load_tasks` needs of each.

    config: a whole recipe. dataset: the folder of stage 02. folder: where ``<task>.test.jsonl`` goes, and
    ``<task>.train.jsonl`` for the shots. Nothing is written for a task that brings its own data. Raises
    RecipeError for a task without enough items.
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
            sides = {"test": packaged_items(name, spec["source"], dataset, normalize, most)}
        else:
            paths = jglue_files(name, spec)
            sides = {side: list(read_jglue(name, path, normalize)) for side, path in paths.items()}
            sides = {"train": sides["train"][:SHOTS], "test": in_hash_order(sides["test"])[:most]}
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
    name: str, source: str, dataset: Path, normalize: Callable[[str], str], most: int | None
) -> list[Item]:
    """The four-choice questions of a packaged task. dataset: the folder of stage 02; source: in dataset.json.

    Raises RecipeError when fewer than four different answers were held out.
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
    items = four_choice(rows, most)
    if not items:
        raise RecipeError(
            f"evaluation.json: tasks.{name}: {source!r} has {len({answer for _, answer in rows})} different "
            f"answers that were held out, expected {WRONG + 1} or more. Remove the task, or raise "
            "dataset.valid_share"
        )
    return items


def four_choice(rows: Iterable[Row], most: int | None = None) -> list[Item]:
    """Four-choice questions: the answer and three answers of other questions.

    A question with several answers is asked once, and none of its answers is a wrong choice. Of `DRAWN`
    random answers of other questions, the three nearest in length to the right one become the wrong choices,
    so that the length does not give the answer away. The random choice depends only on the question and the
    answers.

    Each item has the keys of its row, ``choices``, and ``answer``, the index of the right choice. most: the
    number of questions to make, the first by their hash. The list is empty where there are fewer than four
    different answers.
    """
    right: dict[str, set[str]] = defaultdict(set)
    for item, answer in rows:
        right[json.dumps(item, ensure_ascii=False)].add(answer)
    answers = sorted(set().union(*right.values()))
    if len(answers) <= WRONG:
        return []
    items = []
    for key in sorted(right, key=text_hash)[:most]:
        draw = random.Random(text_hash(key))
        answer = min(right[key])
        drawn = draw.sample(answers, min(len(answers), DRAWN + 1))
        others = [other for other in drawn if other not in right[key]]
        wrong = sorted(others, key=lambda other: abs(len(other) - len(answer)))[:WRONG]
        choices = [answer, *wrong]
        draw.shuffle(choices)
        items.append(json.loads(key) | {"choices": choices, "answer": choices.index(answer)})
    return items


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
    rows: Iterable[dict[str, Any]], context: Callable[[list[dict[str, str]]], str], most: int | None
) -> list[Item]:
    """The pairs of stage 11's validation side as four-choice questions, up to `most` of each source.

    rows: the pairs as stage 11 wrote them; the turns before a pair belong to its question. context: turns
    a conversation into a context of the harness. Where pairs have an input, the wrong choices are answers to
    the same instruction. Sources with fewer than four different answers are left out.
    """
    kinds: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        kind = (row["source"], row["instruction"] if row["input"] else "")
        item = {"conversation": context(messages_of(row)[:-1]), "source": row["source"]}
        kinds[kind].append((item, row["output"]))
    asked: Counter[str] = Counter()
    items = []
    for (source, _), found in sorted(kinds.items()):
        new = four_choice(found, None if most is None else max(0, most - asked[source]))
        asked[source] += len(new)
        items += new
    return items


# ------------------------------------------------------------------------------------------------------ JGLUE


def jglue_files(name: str, spec: dict[str, str]) -> dict[str, Path]:
    """The training and validation file of a task of JGLUE (Kurihara et al., 2022), as ``train`` and ``test``.

    They are taken from the folder `path` of the task; without `path` they are downloaded once from JGLUE's
    repository (CC BY-SA 4.0) into data/. Raises RecipeError for a folder without the files.
    """
    if "path" in spec:
        folder, found = ROOT / Path(spec["path"]).expanduser(), {}
        for side, pattern in (("train", "train-*.json"), ("test", "valid-*.json")):
            files = sorted(folder.glob(pattern))
            if len(files) != 1:
                raise RecipeError(
                    f"evaluation.json: tasks.{name}.path: {folder}: {len(files)} files {pattern}, not one. "
                    "Give the folder of JGLUE with the train-*.json and valid-*.json of this task"
                )
            found[side] = files[0]
        return found
    folder = DATA / "jglue" / name
    folder.mkdir(parents=True, exist_ok=True)
    found = {"train": folder / "train-v1.3.json", "test": folder / "valid-v1.3.json"}
    for side, path in found.items():
        if not path.exists():
            fetch(f"{JGLUE}/{name}-v1.3/{path.name}", path, JGLUE_SHA256.get(f"{name}/{side}"))
    return found


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
