"""The speed of cleaning on one core: a plain loop over lines with neologdn, and this recipe.

All peers read the same raw documents in turn, in three rounds; the best round counts:

- ``plain``: neologdn.normalize on every line, as common recipes do; nothing else.
- ``exact``: `recipe.corpus.normalizing` without `keep_dashes` and `clean_characters`; its output is compared
  with that of ``plain``, byte by byte.
- ``normalise``: the same with the default of both keys.
- ``keep``: ``"layout": "keep"``, which normalises characters only.
- ``clean``: normalise + filter + exact deduplication by hash, with the filters of configs/tiny, and with the
  sets of rules for books and for the web.

A text with control characters is rejected before it is normalised. The table gives their share, and every
peer runs again on a corpus without such texts. The third corpus has only documents that pass all rules of the
web set, where no filter saves any work. The last table compares one worker process with two.

Run (2 minutes, nothing else running):  .venv/bin/python tests/bench/cleaning.py [DATA]
DATA is the folder that stage 01 filled (default: data/).
"""

import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import neologdn
from recipe.corpus.cleaning import make_cleaner
from recipe.corpus.normalizing import make_normalizer
from recipe.corpus.sources import read
from recipe.corpus.splitting import text_hash

ROOT = Path(__file__).resolve().parents[2]
KEEP = json.loads((ROOT / "configs/tiny/dataset.json").read_text("utf-8")) | {"layout": "keep"}
CONFIG = KEEP | {"layout": "neologdn"}
ROUNDS = 3


def write_raw(data: Path, path: Path) -> None:
    """Write all documents of the packaged sources, as they are read: a JSON string per line."""
    with path.open("w", encoding="utf-8") as file:
        for name, source in CONFIG["sources"].items():
            for document in read(name, source, data):
                if not document.dropped:
                    file.write(json.dumps(document.text) + "\n")


def load(path: Path) -> list[str]:
    """The raw documents."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def plain(texts: list[str]) -> list[str]:
    """neologdn on every line, without the empty lines."""
    return [
        "\n".join(
            filter(
                None,
                (neologdn.normalize(line, tilde="ignore") for line in text.replace("～", "〜").splitlines()),
            )
        )
        for text in texts
    ]


def exact(texts: list[str]) -> list[str]:
    """The recipe's normaliser with the output of neologdn."""
    return list(map(make_normalizer(CONFIG | {"keep_dashes": False, "clean_characters": False}), texts))


def normalise(texts: list[str]) -> list[str]:
    """The recipe's normaliser alone."""
    return list(map(make_normalizer(CONFIG), texts))


def keep(texts: list[str]) -> list[str]:
    """The recipe's normaliser of characters only."""
    return list(map(make_normalizer(KEEP), texts))


def clean(texts: list[str], rules: str | None = None, config: dict[str, Any] = CONFIG) -> list[str]:
    """Normalise, filter and drop exact duplicates; return the texts that are kept."""
    clean_text = make_cleaner(config, {"rules": rules})
    seen, kept = set(), []
    for text in texts:
        text, reason = clean_text(text)
        if not reason and (identity := text_hash(text)) not in seen:
            seen.add(identity)
            kept.append(text)
    return kept


def clean_keep(texts: list[str]) -> list[str]:
    """`clean` with ``"layout": "keep"``."""
    return clean(texts, config=KEEP)


def clean_books(texts: list[str]) -> list[str]:
    """`clean` with the set of rules for books."""
    return clean(texts, "books")


def clean_web(texts: list[str]) -> list[str]:
    """`clean` with the set of rules for the web."""
    return clean(texts, "web")


PEERS = {
    "plain": plain,
    "exact": exact,
    "normalise": normalise,
    "keep": keep,
    "clean (neologdn)": clean,
    "clean (keep)": clean_keep,
    "clean (books)": clean_books,
    "clean (web)": clean_web,
}


def megabytes(texts: list[str]) -> float:
    """Size in UTF-8."""
    return sum(len(text.encode("utf-8", "replace")) for text in texts) / 1e6


def measure(texts: list[str]) -> dict[str, tuple[float, list[str]]]:
    """The best seconds and the output of every peer; the peers run in turn."""
    results: dict[str, tuple[float, list[str]]] = {}
    for _ in range(ROUNDS):
        for name, peer in PEERS.items():
            started = time.perf_counter()
            output = peer(texts)
            seconds = time.perf_counter() - started
            results[name] = min(results.get(name, (seconds, output)), (seconds, output), key=lambda r: r[0])
    return results


def print_corpus(title: str, texts: list[str]) -> None:
    """Print the table of one corpus."""
    results = measure(texts)
    assert results["exact"][1] == results["plain"][1], "the output differs from that of neologdn"
    size, base = megabytes(texts), results["plain"][0]
    print(f"\n{title}: {len(texts):,} documents, {size:.1f} MB; output of `exact` identical to `plain`\n")
    print("| peer | MB/s per core | against plain | documents kept |\n|---|---:|---:|---:|")
    for name, (seconds, output) in results.items():
        print(f"| {name} | {size / seconds:.1f} | {base / seconds:.2f}x | {len(output) / len(texts):.1%} |")


def clean_half(path: Path, part: int, parts: int, barrier: multiprocessing.Barrier) -> None:
    """A worker: cleans its share of the documents between two barriers, so that loading is not measured."""
    texts = load(path)[part::parts]
    clean_web(texts[:100])
    barrier.wait()
    for _ in range(2 * ROUNDS):
        clean_web(texts)
    barrier.wait()


def seconds_with(workers: int, path: Path) -> float:
    """Seconds until all workers have cleaned their shares."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(workers + 1)
    processes = [context.Process(target=clean_half, args=(path, n, workers, barrier)) for n in range(workers)]
    for process in processes:
        process.start()
    barrier.wait()
    started = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - started
    for process in processes:
        process.join()
    return seconds


def main() -> None:
    """Print the tables."""
    data = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "data"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "raw.jsonl"
        write_raw(data, path)
        texts = load(path)
        clean_text = make_cleaner(CONFIG, {})
        whole = [text for text in texts if clean_text(text)[1] != "control characters"]
        early = 1 - megabytes(whole) / megabytes(texts)
        print_corpus(f"Raw text of the packaged sources, {early:.2%} of the bytes rejected early", texts)
        print_corpus("The same, nothing rejected early", whole)
        print_corpus("What passes every rule of the web set", clean_web(texts))
        one, two = (seconds_with(workers, path) for workers in (1, 2))
        print("\n| worker processes, clean (web) | seconds | speed |\n|---:|---:|---:|")
        print(f"| 1 | {one:.2f} | 1.00x |\n| 2 | {two:.2f} | {one / two:.2f}x |")


if __name__ == "__main__":
    main()
