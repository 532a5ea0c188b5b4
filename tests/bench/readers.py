"""The speed of `recipe.corpus.readers`, compared with a loop over lines with the usual library.

The text is generated: lines and documents as long as those of CC-100 ja (130 bytes a line, 1 kB a document).

- ``lines``: open the file as text with the library of its form, and loop over the lines.
- ``documents``: the same loop, with the lines between empty ones joined. It does the same as `read_file`, but
  checks nothing: a truncated .zst ends silently, and no fault has a line number.

Each number is the best of three runs in one process. `aozora.prose` has no peer: no library does the same.

Run (two minutes, nothing else running):  PYTHONPATH=pretrain .venv/bin/python tests/bench/readers.py
"""

import bz2
import gzip
import itertools
import json
import lzma
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import zstandard
from recipe.corpus.aozora import prose
from recipe.corpus.readers import read_file

MEGABYTES = 40
LETTERS = "のにはをたがでてと日本語学文章私人年大山川田中東京気見行来食飲書読話聞今明昨週月火水木金土時分秒"
OPEN: dict[str, tuple[Callable, Callable]] = {
    "": (open, bytes),
    ".gz": (gzip.open, gzip.compress),
    ".bz2": (bz2.open, bz2.compress),
    ".xz": (lzma.open, lzma.compress),
    ".zst": (zstandard.open, zstandard.compress),
}
WORK = (
    "　私は山路《やまじ》を｜一人旅《ひとりたび》で歩いた。※［＃「口＋世」、第3水準1-14-91］の"
    "紅葉［＃「紅葉」に傍点］を見た。\n"
)


def made_up_documents() -> Iterator[str]:
    """Generated documents of 1 to 12 lines, MEGABYTES in all."""
    chance, size = random.Random(0), 0
    while size < MEGABYTES * 1e6:
        lines = (
            "".join(chance.choices(LETTERS, k=chance.randint(5, 80))) for _ in range(chance.randint(1, 12))
        )
        document = "。\n".join(lines)
        size += len(document.encode())
        yield document


def joined(lines: Iterable[str]) -> Iterator[str]:
    """Documents from an iteration over lines."""
    for empty, group in itertools.groupby(lines, lambda line: not line.strip()):
        if not empty:
            yield "".join(group)


def megabytes_a_second(count: Callable[[], int], size: int) -> float:
    """The best speed of three runs."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        count()
        seconds.append(time.perf_counter() - start)
    return size / 1e6 / min(seconds)


def main() -> None:
    """Print a table of speeds and ratios."""
    documents = list(made_up_documents())
    bodies = {
        ".txt": "\n\n".join(documents).encode(),
        ".jsonl": "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in documents).encode(),
    }
    print("| file | lines MB/s | documents MB/s | read_file MB/s | to lines | to documents |")
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for (kind, body), (compression, (opener, pack)) in itertools.product(bodies.items(), OPEN.items()):
            path = Path(folder, f"a{kind}{compression}")
            path.write_bytes(pack(body))

            def lines(path=path, opener=opener) -> Iterator[str]:
                with opener(path, "rt", encoding="utf-8") as file:
                    yield from file

            def text(kind=kind, lines=lines) -> Iterator[str]:
                return joined(lines()) if kind == ".txt" else (json.loads(line)["text"] for line in lines())

            def raw(path=path, opener=opener) -> int:
                with opener(path, "rt", encoding="utf-8") as file:
                    return sum(1 for _ in file)

            speeds = [
                megabytes_a_second(raw, len(body)),
                megabytes_a_second(lambda text=text: sum(1 for _ in text()), len(body)),
                megabytes_a_second(lambda path=path: sum(1 for _ in read_file(path)), len(body)),
            ]
            cells = [f"{speed:.0f}" for speed in speeds]
            cells += [f"{speeds[2] / speeds[0]:.2f}", f"{speeds[2] / speeds[1]:.2f}"]
            print(f"| {path.name} | " + " | ".join(cells) + " |", flush=True)
    work = WORK * 10_000
    speed = megabytes_a_second(lambda: len(prose(work)[0]), len(work.encode()))
    print(f"\naozora.prose: {speed:.1f} MB/s of raw text")


if __name__ == "__main__":
    main()
