"""The table of docs/networks.md: its place and its rows."""

from __future__ import annotations

from pathlib import Path

from .entries import Entry

TABLE = Path(__file__).parents[2] / "docs" / "networks.md"
BEGIN, END = "<!-- zoo: begin -->", "<!-- zoo: end -->"


def row(entry: Entry, times: tuple[str, str] = ("", "")) -> str:
    """One row of the table, its times left out where there are none."""
    outcome = f"refused: {entry.refused}" if entry.refused else "packed"
    return f"| {entry.codebase} | {entry.name} | {entry.kind} | {outcome} | {' | '.join(times)} |"
