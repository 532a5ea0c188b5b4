"""The speed of wikitext extraction, and the share of paragraphs that are extracted exactly.

Peers, on the same pages in the same process, one core:

- ``node removal``: mwparserfromhell as commonly used: parse, remove templates, tables, references, galleries,
  files and categories as nodes, then `strip_code`.
- ``parse alone``: only `mwparserfromhell.parse`, the least time for any method that parses the page.

The corpus is hand-written in the style of Japanese Wikipedia (tests/unit/corpus/wikipedia). It is difficult
on purpose, and its author also wrote the module: expect lower recall on real articles. Recall is the share of
expected paragraphs that are extracted exactly, except for white space at their ends. Precision is the share
of output lines that were expected. The peers run in turn; the median of the rounds counts.

Run (about 15 seconds, nothing else running):  .venv/bin/python tests/bench/wikipedia.py
"""

import statistics
import time
from collections import Counter
from pathlib import Path

import mwparserfromhell
from recipe.corpus.wikitext import extract

PAGES = Path(__file__).resolve().parents[1] / "unit/corpus/wikipedia"
REPEATS, ROUNDS = 5, 5
TAGS_OUT = {"ref", "table", "gallery", "syntaxhighlight", "source", "pre", "score"}
LINKS_OUT = ("file:", "image:", "category:", "ファイル:", "画像:", "カテゴリ:")


def remove_nodes(title: str, text: str) -> str:
    """Prose by removal of nodes."""
    code = mwparserfromhell.parse(text)
    removed = [
        *code.filter_templates(),
        *code.filter_tags(matches=lambda tag: str(tag.tag).lower() in TAGS_OUT),
        *code.filter_wikilinks(matches=lambda link: str(link.title).lower().startswith(LINKS_OUT)),
    ]
    for node in removed:
        try:
            code.remove(node)
        except ValueError:  # it was in a node that is removed already
            continue
    return code.strip_code()


PEERS = {
    "node removal": remove_nodes,
    "parse alone": lambda title, text: mwparserfromhell.parse(text) and "",
    "recipe.corpus.wikitext": lambda title, text: extract(title, text)[0],
}


def lines(text: str) -> Counter[str]:
    """The lines of a text that are not empty, with their counts."""
    return Counter(line.strip() for line in text.splitlines() if line.strip())


def main() -> None:
    """Print speed, recall and precision of each peer, and the paragraphs that `extract` misses."""
    pages = [(path.stem, path.read_text("utf-8")) for path in sorted(PAGES.glob("*.wiki"))]
    expected = {title: lines((PAGES / f"{title}.txt").read_text("utf-8")) for title, _ in pages}
    megabytes = REPEATS * sum(len(text.encode()) for _, text in pages) / 1e6
    seconds: dict[str, list[float]] = {name: [] for name in PEERS}
    for _ in range(ROUNDS):
        for name, prose in PEERS.items():
            start = time.process_time()
            for _ in range(REPEATS):
                for title, text in pages:
                    prose(title, text)
            seconds[name].append(time.process_time() - start)
    speeds = {name: megabytes / statistics.median(times) for name, times in seconds.items()}
    total = sum(count.total() for count in expected.values())
    print(f"{len(pages)} hand-written pages, {total} expected paragraphs, {megabytes / REPEATS:.3f} MB\n")
    print("| peer | MB/s per core | against node removal | recall | precision |")
    print("|---|---:|---:|---:|---:|")
    for name, prose in PEERS.items():
        found = {title: lines(prose(title, text)) for title, text in pages}
        right = sum((found[title] & expected[title]).total() for title in found)
        came = sum(count.total() for count in found.values())
        ratio = speeds[name] / speeds["node removal"]
        quality = f"{right / total:.1%} | {right / came:.1%}" if came else "- | -"
        print(f"| {name} | {speeds[name]:.2f} | {ratio:.1f}x | {quality} |")
    for title, text in pages:
        for line in expected[title] - lines(extract(title, text)[0]):
            print(f"\nmissed in {title}: {line}")


if __name__ == "__main__":
    main()
