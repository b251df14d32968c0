"""docs/troubleshooting.md knows every message that the package raises, and none that it does not."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
SOURCES = sorted((ROOT / "qpilots_fast").rglob("*.py"))
UNSAID = {"AssertionError", "_Reached"}  # never reach a user
FEWEST_LETTERS = {"message": 12, "excerpt": 5}  # fewer of its own say nothing: what is filled in does


def _text(node: ast.expr) -> str:
    """A message as it is written, with … for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return "…"


def _raised(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
        if ast.unparse(node.exc.func) not in UNSAID:
            yield _text(node.exc.args[0])
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("warn", "_log.warning", "RuntimeError"):
        yield _text(node.args[0])


@lru_cache(maxsize=1)
def messages() -> dict[str, str]:
    """Every message of an error or a warning, and where it stands."""
    return {
        text: f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        for text in _raised(node)
    }


@lru_cache(maxsize=1)
def families() -> dict[str, re.Pattern[str]]:
    """The page's excerpts: the first cells of its tables under a heading "says"."""
    found = {}
    for table in re.findall(r"^\| says .*\n\|[-|]+\n((?:\|.*\n)+)", PAGE.read_text(), re.MULTILINE):
        for row in table.splitlines():
            for excerpt in re.findall(r"`([^`]+)`", row.split("|")[1]):
                found[excerpt] = re.compile(".*".join(map(re.escape, excerpt.split("…"))), re.DOTALL)
    return found


def test_every_message_has_an_entry():
    assert len(messages()) > 300 and len(families()) > 100
    known = families().values()
    telling = {text for text in messages() if len(re.findall(r"[a-z]", text)) >= FEWEST_LETTERS["message"]}
    assert not {messages()[text]: text for text in telling if not any(family.search(text) for family in known)}


def test_every_entry_has_a_message():
    of_parts = {"runs as a callable"}  # a line of the log, put together
    stale = [excerpt for excerpt, family in families().items() if not any(map(family.search, messages()))]
    assert set(stale) == of_parts
    assert all(len(re.findall(r"[a-z]", excerpt)) >= FEWEST_LETTERS["excerpt"] for excerpt in families())


def test_no_entry_speaks_of_everything():
    counts = {excerpt: sum(map(bool, map(family.search, messages()))) for excerpt, family in families().items()}
    assert max(counts.values()) <= len(messages()) / 5
