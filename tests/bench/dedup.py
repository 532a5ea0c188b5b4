"""Our MinHash (recipe/corpus/minhash.py, dedup.py) against datatrove's, on planted near duplicates.

The peer is datatrove's stock MinHash (14 buckets x 8 hashes, 64-bit xxhash, 5-grams) with characters as words
and its removal of diacritics off, which would make が and か equal. Both read the same Parquet shards in one
process, phase after phase; each runs in a process of its own, three times in turn, and the fastest counts.
The last shard holds planted copies of documents of at least 200 letters, with some of the characters
edited: one passage (inserted, deleted or replaced, where the new text comes from another document), or
single characters (replaced by another character of the corpus). A copy is found when it is in one cluster
with its original. Pairs are judged by the Jaccard similarity of the 5-grams of their folded texts.

Run (about 1 minute, nothing else running):
    PYTHONPATH=pretrain .venv/bin/python tests/bench/dedup.py [outputs/tiny/02_dataset]
"""

import logging
import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.readers import ParquetReader
from datatrove.utils.logging import logger
from datatrove.utils.text import TextNormConfig
from datatrove.utils.word_tokenizers import WordTokenizer
from recipe.corpus import dedup
from recipe.corpus.minhash import MINHASH, fold
from recipe.corpus.shards import shard_rows
from recipe.corpus.splitting import text_hash

PLANTED = 500  # copies of each kind
EDITS = ("passage inserted, deleted or replaced", "passage replaced", "characters here and there")
KINDS = [(edit, share) for edit in EDITS for share in (0.03, 0.15)]
BANDS, ROWS, NGRAM = (MINHASH[key] for key in ("bands", "rows", "ngram"))


class Characters(WordTokenizer):
    """Each character is a word."""

    def word_tokenize(self, text: str) -> list[str]:
        """The characters of a text."""
        return list(text)

    def sent_tokenize(self, text: str) -> list[str]:
        """Not used."""
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Not used."""
        return []


def edit(text: str, kind: str, share: float, letters: str, draw: random.Random) -> str:
    """A text with a share of its characters edited."""
    count = max(1, round(len(text) * share))
    if kind.startswith("passage"):
        start, other = draw.randrange(len(text) - count + 1), draw.randrange(len(letters) - count)
        action = "replace" if kind == "passage replaced" else draw.choice(("insert", "delete", "replace"))
        new = "" if action == "delete" else letters[other : other + count]
        return text[:start] + new + text[start if action == "insert" else start + count :]
    characters = list(text)
    for i in draw.sample(range(len(text)), count):
        characters[i] = draw.choice(letters)
    return "".join(characters)


def write_shard(path: Path, texts: list[str]) -> None:
    """A clean shard of some texts, and its file of hashes."""
    hashes = [text_hash(text) for text in texts]
    columns = {"id": [h.hex() for h in hashes], "source": ["bench"] * len(texts), "text": texts}
    pq.write_table(pa.table(columns), path, compression="zstd")
    np.save(path.with_suffix(".npy"), np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16))


def plant(corpus: Path, folder: Path) -> dict[tuple[str, float], list[tuple[int, int]]]:
    """Write the corpus as shards with the copies in the last; (original, copy) of each kind."""
    draw = random.Random(1)
    copies, pairs = [], {kind: [] for kind in KINDS}
    shards = sorted(corpus.glob("train-*.parquet"))
    for shard, path in enumerate(shards):
        texts = pq.read_table(path)["text"].to_pylist()
        write_shard(folder / f"{shard:05d}.parquet", texts)
        long = [i for i, text in enumerate(texts) if len(fold(text)) >= 200]
        letters = "".join(texts).replace("\n", "")
        chosen = iter(draw.sample(long, min(len(long), PLANTED * len(KINDS) // len(shards))))
        for number, row in enumerate(chosen):
            kind = KINDS[number % len(KINDS)]
            pairs[kind].append((shard << 32 | row, len(shards) << 32 | len(copies)))
            copies.append(edit(texts[row], *kind, letters, draw))
    write_shard(folder / f"{len(shards):05d}.parquet", copies)
    return pairs


def phases_of_ours(shards: list[Path], work: Path) -> dict[str, object]:
    """Our phases, each a function without arguments; the last gives the number of documents left."""

    def run(steps: list, tasks: int) -> None:
        for rank in range(tasks):
            for step in steps:
                step.run(None, rank, tasks)

    def leave_out() -> int:
        left = 0
        for shard, path in enumerate(shards):
            removed = set(np.concatenate(list(dedup.removed_rows(work, shard).values())).tolist())
            left += sum(row not in removed for row, _ in enumerate(shard_rows(path, ["text"])))
        return left

    run(dedup.exact([path.with_suffix(".npy") for path in shards], work), 1)
    return {
        "signatures": lambda: run(dedup.signatures(shards, work, {}), len(shards)),
        "buckets": lambda: run(dedup.buckets(shards, work, {}), BANDS),
        "clusters": lambda: run(dedup.clusters(shards, work, {}), 1),
        "leave out": leave_out,
    }


def phases_of_stock(shards: list[Path], work: Path) -> dict[str, object]:
    """The same of datatrove's stock steps."""
    config = MinhashConfig(norm_config=TextNormConfig(norm_unicode_diacritics=False))
    signatures, pairs, removed = (str(work / name) for name in ("signatures", "pairs", "near-duplicate"))

    def read(rank: int):
        return ParquetReader(str(shards[0].parent), glob_pattern="*.parquet", doc_progress=False).run(
            None, rank, len(shards)
        )

    def sign() -> None:
        step = MinhashDedupSignature(signatures, config, language=Characters())
        for rank in range(len(shards)):
            step.run(read(rank), rank, len(shards))

    def find_pairs() -> None:
        step = MinhashDedupBuckets(signatures, pairs, config=config)
        for rank in range(BANDS):
            step.run(None, rank, BANDS)

    def leave_out() -> int:
        step = MinhashDedupFilter(removed)
        return sum(1 for rank in range(len(shards)) for _ in step.run(read(rank), rank, len(shards)))

    return {
        "signatures": sign,
        "buckets": find_pairs,
        "clusters": lambda: MinhashDedupCluster(pairs, removed, config).run(None, 0, 1),
        "leave out": leave_out,
    }


SYSTEMS = {"stock datatrove": phases_of_stock, "recipe": phases_of_ours}


def measure(system: str, folder: Path, work: Path, answer) -> None:
    """Run a system's phases in this process; sends seconds by phase, documents left, MiB over the start."""
    logger.remove()
    logging.disable()
    shards = sorted(folder.glob("*.parquet"))
    start = peak_memory(reset=True)
    seconds, left = {}, 0
    for name, phase in SYSTEMS[system](shards, work).items():
        began = time.perf_counter()
        left = phase()
        seconds[name] = time.perf_counter() - began
    answer.put((seconds, left, peak_memory() - start))


def peak_memory(reset: bool = False) -> float:
    """Most resident MiB of this process so far; `reset` starts again from what it holds now (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def in_a_process(system: str, folder: Path, work: Path) -> tuple[dict[str, float], int, float]:
    """`measure` in a new process."""
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=measure, args=(system, folder, work, answer))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{system} ended with {process.exitcode}")
    return answer.get()


def read_pairs(work: Path) -> np.ndarray:
    """The different pairs a system found, as two numbers each: shard * 2^32 + row."""
    files = [np.fromfile(path, "<u4").reshape(-1, 2, 2) for path in (work / "pairs").glob("*.dups")]
    pairs = np.concatenate(files).astype(np.uint64)
    return np.unique(np.sort(pairs[:, :, 0] << np.uint64(32) | pairs[:, :, 1], axis=1), axis=0)


def main() -> None:
    """Print seconds by phase, what was found, and what it took."""
    corpus = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/tiny/02_dataset")
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        folder = top / "shards"
        folder.mkdir()
        planted = plant(corpus, folder)
        shards = sorted(folder.glob("*.parquet"))
        texts = [pq.read_table(path)["text"].to_pylist() for path in shards]
        runs: dict[str, list] = {system: [] for system in SYSTEMS}
        for attempt in range(3):
            for system in SYSTEMS:
                runs[system].append(in_a_process(system, folder, top / f"{system}{attempt}"))
        print_times(runs, sum(map(len, texts)), sum(len(text) for shard in texts for text in shard))
        print_quality({system: read_pairs(top / f"{system}0") for system in SYSTEMS}, texts, planted)
        one = top / "one"
        one.mkdir()
        write_shard(one / "00000.parquet", ["".join(text for shard in texts for text in shard)[:400_000]])
        print_size({system: in_a_process(system, one, top / f"one {system}")[2] for system in SYSTEMS}, runs)


def print_times(runs: dict[str, list], documents: int, characters: int) -> None:
    """Seconds by phase, the fastest of the runs in all, side by side."""
    best = {system: min(attempts, key=lambda one: sum(one[0].values())) for system, attempts in runs.items()}
    stock, ours = (best[system][0] for system in SYSTEMS)
    print(f"{documents:,} documents, {characters / 1e6:.1f} million characters; seconds, one core\n")
    print("| phase | " + " | ".join(SYSTEMS) + " | ratio |\n|---|---:|---:|---:|")
    for phase in stock:
        print(f"| {phase} | {stock[phase]:.2f} | {ours[phase]:.2f} | {stock[phase] / ours[phase]:.1f} |")
    totals = sum(stock.values()), sum(ours.values())
    print(f"| all | {totals[0]:.2f} | {totals[1]:.2f} | {totals[0] / totals[1]:.1f} |")
    print("| documents left | " + " | ".join(f"{best[system][1]:,}" for system in SYSTEMS) + " | |\n")


def print_quality(pairs: dict[str, np.ndarray], texts: list[list[str]], planted: dict) -> None:
    """Recall of what was planted, and how similar the pairs are that were found."""
    grams: dict[int, set[str]] = {}

    def jaccard(one: int, other: int) -> float:
        for document in (one, other):
            if document not in grams:
                text = fold(texts[document >> 32][document & 0xFFFFFFFF], " ")
                grams[document] = {text[i : i + NGRAM] for i in range(len(text) - NGRAM + 1)}
        return len(grams[one] & grams[other]) / len(grams[one] | grams[other])

    roots = {}
    for system, found in pairs.items():
        nodes, root = dedup.first_of_cluster(found[:, 0], found[:, 1])
        roots[system] = dict(zip(nodes.tolist(), root.tolist(), strict=True))
    print("| planted: edited | copies | mean Jaccard | recall expected | " + " | ".join(SYSTEMS) + " |")
    print("|---|---:|---:|---:|---:|---:|")
    for (kind, share), examples in planted.items():
        similar = np.array([jaccard(*example) for example in examples])
        expected = (1 - (1 - similar**ROWS) ** BANDS).mean()
        cells = [f"{share:.0%} {kind}", str(len(examples)), f"{similar.mean():.3f}", f"{expected:.3f}"]
        for system in SYSTEMS:
            root = roots[system]
            recall = np.mean([a in root and root[a] == root.get(b) for a, b in examples])
            cells.append(f"{recall:.3f}")
        print("| " + " | ".join(cells) + " |")
    print("\n| pairs found | " + " | ".join(SYSTEMS) + " |\n|---|---:|---:|")
    similar = {system: np.array([jaccard(*pair) for pair in pairs[system].tolist()]) for system in SYSTEMS}
    for label, low, high in (("", 0, 1.01), (": Jaccard below .5", 0, 0.5), (": below .3", 0, 0.3)):
        counts = [((similar[system] >= low) & (similar[system] < high)).sum() for system in SYSTEMS]
        print(f"| all{label} | " + " | ".join(f"{count:,}" for count in counts) + " |")


def print_size(one: dict[str, float], runs: dict[str, list]) -> None:
    """Memory over what the process held before, and what is kept for each document."""
    print("\n| size | " + " | ".join(SYSTEMS) + " |\n|---|---:|---:|")
    peaks = (f"{max(run[2] for run in runs[system]):,.0f}" for system in SYSTEMS)
    print("| peak MiB over the start, this corpus | " + " | ".join(peaks) + " |")
    print(
        "| the same, one document of 400,000 characters | "
        + " | ".join(f"{one[s]:,.0f}" for s in SYSTEMS)
        + " |"
    )
    stock, ours = BANDS * (8 * ROWS + 4), BANDS * dedup.RECORD.itemsize
    print(f"| bytes on disk per document, MinHash | {stock} | {ours} |")
    print("| bytes on disk per document, exact | | 16 |")


if __name__ == "__main__":
    main()
