"""The documents name what is there: links, files, identifiers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import tables

ROOT = Path(__file__).resolve().parents[1]
CPU = ROOT / "csrc" / "cpu"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), CPU / "README.md"])


def words(*patterns: str) -> set[str]:
    """Every identifier of the sources that match, relative to the root."""
    return {
        word for pattern in patterns for file in ROOT.glob(pattern) for word in re.findall(r"\w+", file.read_text())
    }


def coded(text: str) -> set[str]:
    """What stands between single backticks, blocks of code left out."""
    return set(re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path):
    text = document.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/adding.md"])
def test_the_guides_name_files_that_exist(name: str):
    paths = {path for path in coded((ROOT / name).read_text()) if re.fullmatch(r"[\w.]+/[\w./]*", path)}
    assert len(paths) > 5 and not {path for path in paths if not (ROOT / path).exists()}


def test_the_map_of_the_cpu_sources_names_what_they_hold():
    named = coded((CPU / "README.md").read_text())
    files = {name for name in named if re.search(r"[./*]", name)}
    assert {"path/", "tuning.h"} < files and {"kStreamRows", "Amx::kRowsTogether"} < named - files
    assert not {name for name in files if name != "-inl.h" and not any(CPU.rglob(name.rstrip("/")))}
    known = words("csrc/cpu/**/*.h", "csrc/cpu/**/*.cpp")
    assert not {name for name in named - files if not set(name.split("::")) <= known}


def test_the_vocabulary_names_what_the_sources_call_it():
    text = (ROOT / "docs" / "method.md").read_text()
    table = text[text.index("## Vocabulary") :].splitlines()
    rows = [line.strip("|").split("|") for line in table if line.startswith("|")][2:]
    assert len(rows) > 25 and {len(row) for row in rows} == {5}
    columns = {
        2: words("qpilots_fast/**/*.py"),
        3: words("csrc/cpu/**/*.h", "csrc/cpu/**/*.cpp", "csrc/include/**/*.h"),
        4: words("csrc/cuda/*", "csrc/include/**/*.h", "qpilots_fast/backends/triton/*.py"),
    }
    for column, known in columns.items():
        named = set().union(*(coded(row[column]) for row in rows))
        assert len(named) > 20 and named - known == set(), column


def test_the_tables_say_what_was_recorded():
    """`python -m bench.tables` writes them."""
    count = 0
    for document in DOCUMENTS:
        text = document.read_text()
        assert tables.written(text) == text, document.name
        assert text.count("<!-- table: ") == len(tables.TABLE.findall(text)), document.name
        count += len(tables.TABLE.findall(text))
    assert count > 6
    with pytest.raises(ValueError, match="expected one of"):
        tables.written("<!-- table: nothing README.md -->\n<!-- end of table -->\n")


def test_the_readme_fits_on_one_screen():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 95 and len(text.split()) <= 750
    assert "never run on a GPU by us" in text[: text.index("## Quickstart")] or "measured on a GPU" in text
