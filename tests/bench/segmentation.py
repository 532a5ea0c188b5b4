"""The speed of segmentation by MeCab and Sudachi, with 1 and 2 workers, and how similar their words are.

The peer of each is the segmenter alone: one call for the same lines, which gives words, but does not check
them and does not keep white space. The second table compares Sudachi's three units of words with those of
JUMAN (MeCab's dictionary): F1 of the word ends.

Run (about a minute, nothing else running), after `run_all.sh --recipe tiny --to 02` or with your own files:
    .venv/bin/python tests/bench/segmentation.py [outputs/tiny/02_dataset/*.parquet]
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
from recipe.project import DATA, OUTPUTS
from recipe.tokenization import word_segmenter

DOCUMENTS = 3000  # of each file
COMPARED = 400


def seconds(work: Callable[[], object]) -> float:
    """The wall time of the faster of two runs."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def bare(segmenter: word_segmenter.Segmenter, lines: list[str]) -> None:
    """The segmenter alone."""
    if segmenter.command:
        subprocess.run(segmenter.command, input="\n".join(lines).encode(), capture_output=True, check=True)
    else:
        tokenizer = word_segmenter._sudachi()
        for line in lines:
            str(tokenizer.tokenize(line))


def word_ends(segmented: list[str]) -> set[int]:
    """The word ends, in characters from the start of the first text."""
    ends, position = set(), 0
    for word in " ".join(segmented).split():
        position += len(word)
        ends.add(position)
    return ends


def main() -> None:
    """Print two Markdown tables."""
    files = [Path(a) for a in sys.argv[1:]] or sorted((OUTPUTS / "tiny/02_dataset").glob("*.parquet"))
    by_file = [pq.read_table(file, columns=["text"])["text"].to_pylist()[:DOCUMENTS] for file in files]
    texts = [text for part in by_file for text in part]
    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts):,} documents, {len(lines):,} lines, {megabytes:.1f} MB\n")
    print("| segmenter | workers | lines/s | MB/s | to 1 worker | to the bare segmenter |")
    print("|---|---|---|---|---|---|")
    for name in ("mecab", "sudachi"):
        segmenter = word_segmenter.make_segmenter(name, DATA)
        times = {"bare": seconds(lambda s=segmenter: bare(s, lines))}
        for workers in (1, 2):
            times[workers] = seconds(lambda s=segmenter, n=workers: list(s.parallel(texts, n)))
        for workers, taken in times.items():
            print(
                f"| {name} | {workers} | {len(lines) / taken:,.0f} | {megabytes / taken:.2f} "
                f"| {times[1] / taken:.2f} | {times['bare'] / taken:.2f} |"
            )
    sample = [text for part in by_file for text in part[:COMPARED]]
    expected = word_ends(word_segmenter.make_segmenter("mecab", DATA).segment(sample))
    print("\n| Sudachi's unit | words | F1 with JUMAN's |")
    print("|---|---|---|")
    import sudachipy

    for mode in "ABC":
        tokenizer = sudachipy.Dictionary(dict="core").tokenizer(mode=mode)
        word_segmenter._sudachi = lambda tokenizer=tokenizer: tokenizer
        found = word_ends(word_segmenter.Segmenter("sudachi").segment(sample))
        print(f"| {mode} | {len(found):,} | {2 * len(found & expected) / (len(found) + len(expected)):.3f} |")
    print(f"| (JUMAN's) | {len(expected):,} | |")


if __name__ == "__main__":
    main()
