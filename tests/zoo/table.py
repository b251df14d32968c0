"""The table of docs/networks.md: its place, its entries and its rows."""

from __future__ import annotations

from pathlib import Path

from .critics import CRITICS
from .entries import Entry
from .flows import FLOWS
from .times import FLOWS_OF_TIME
from .weights import CRITICS_OF_WEIGHTS

ENTRIES = (*CRITICS, *CRITICS_OF_WEIGHTS, *FLOWS, *FLOWS_OF_TIME)
TABLE = Path(__file__).parents[2] / "docs" / "networks.md"
BEGIN, END = "<!-- zoo: begin -->", "<!-- zoo: end -->"


def row(entry: Entry, times: tuple[str, str] = ("", "")) -> str:
    """One row of the table, its times left out where there are none."""
    outcome = f"refused: {entry.refused}" if entry.refused else "packed"
    return f"| {entry.codebase} | {entry.name} | {entry.kind} | {outcome} | {' | '.join(times)} |"


def written() -> dict[str, tuple[str, str]]:
    """The rows as they stand, without their times, and these."""
    lines = TABLE.read_text().split(BEGIN)[1].split(END)[0].splitlines()[3:]
    parts = [line.rsplit(" | ", 2) for line in lines if line]
    return {begin: (mine, theirs.removesuffix(" |")) for begin, mine, theirs in parts}
