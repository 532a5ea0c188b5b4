"""The ledger's first table is the one that its program prints from ledger.jsonl."""

from bench import ledger
from conftest import ROOT

ROWS = ledger.read_results(ledger.RESULTS)


def test_the_page_shows_the_results():
    page = (ROOT / "tests/bench/ledger.md").read_text("utf-8")
    assert "\n\n" + "\n".join(ledger.table(ROWS)) + "\n\n" in page


def test_each_result_is_a_row_of_the_program_and_stands_there_once():
    keys = [(row["size"], row["choice"], row["seed"], row["of"]) for row in ROWS]
    assert len(set(keys)) == len(keys) > 0
    assert {(size, choice) for size, choice, *_ in keys} <= {
        (s, c) for s in ledger.SIZES for c in ledger.CHOICES
    }
