"""The table of faults that `bash tests/run.sh faults` prints at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest


class Row(NamedTuple):
    """What happened when a fault was caused: how often, how often the run survived, and what was lost.

    silent: results that were wrong without a message. lost: the most training steps that were repeated.
    """

    fault: str
    tried: int
    survived: int
    silent: int = 0
    lost: int | None = None


_ROWS: dict[str, Row] = {}


@pytest.fixture
def fault_row() -> Callable[..., Row]:
    """Record a row of the table, from the fields of `Row`; returns it. Tries of one fault are added up."""

    def record(*fields: object, **named: object) -> Row:
        row = Row(*fields, **named)
        if before := _ROWS.get(row.fault):
            tried, survived = before.tried + row.tried, before.survived + row.survived
            row = row._replace(tried=tried, survived=survived, silent=before.silent + row.silent)
        _ROWS[row.fault] = row
        return row

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the rows as a Markdown table."""
    if not _ROWS:
        return
    lines = ["| fault | tried | survived | silently wrong | lost steps |", "|---|---|---|---|---|"]
    for row in _ROWS.values():
        cells = ["" if cell is None else str(cell) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    terminalreporter.write_line("\n".join(["", *lines]))
