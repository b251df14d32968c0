"""What is written for contributors holds: workflows call what exists, and every environment variable is named."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import qpilots_fast

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
WORKFLOWS = [*(ROOT / ".github" / "workflows").glob("*.yml")]
TARGETS = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
SOURCES = ("setup.py", "Makefile", "qpilots_fast/**/*.py", "bench/**/*.py", "tests/**/*.py", "csrc/cpu/**/*.cpp")


def test_workflows_call_parts_that_make_knows():
    parts = {part for path in WORKFLOWS for part in re.findall(r"\.ci/run ([\w-]+)", path.read_text())}
    listed = {part for path in WORKFLOWS for part in re.findall(r"\btest-[\w-]+", path.read_text())}
    assert len(WORKFLOWS) >= 2 and len(listed) >= 5
    assert parts | listed <= TARGETS


def test_the_guide_names_targets_that_make_knows():
    assert set(re.findall(r"\bmake ([\w-]+)", GUIDE)) <= TARGETS


def test_every_environment_variable_is_in_the_guide():
    asked = r"(?:environ(?:\.get|\.setdefault|\.pop)?[\[(]|getenv\(|_VARIABLE = )\s*\"(QPILOTS_\w+|TRITON_INTERPRET)\""
    text = "".join(path.read_text() for pattern in SOURCES for path in ROOT.glob(pattern))
    found = set(re.findall(asked, text))
    assert {"QPILOTS_CPU_ISA", "QPILOTS_WRITE_WATCH", "QPILOTS_NATIVE"} < found
    table = GUIDE[GUIDE.index("## Environment variables") : GUIDE.index("## Where things are")]
    assert found == set(re.findall(r"QPILOTS_\w+|TRITON_INTERPRET", table))


def test_what_stands_under_a_name_is_written_whole():
    """Through qpilots_fast.files, but for logs and what no one reads later."""
    direct = re.compile(r"\.savefig\(|\.write_(?:text|bytes)\(|\bopen\((?:.+, )?\"[wx]")
    paths = [path for part in ("qpilots_fast", "bench", "docs", "examples") for path in (ROOT / part).rglob("*.py")]
    lines = {line.strip() for path in paths for line in path.read_text().splitlines() if direct.search(line)}
    assert len(lines) > 8
    whole = re.compile(r"\bnew\b|_curve\.csv|cubin|clear_refs|^claim\.")
    assert not [line for line in lines if not whole.search(line)]


def test_the_version_has_a_section_of_the_changelog():
    headings = re.findall(
        r"^## \[([^\]]+)\](?: - (\d{4}-\d\d-\d\d))?", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    released = [(version, date) for version, date in headings if version != "Unreleased"]
    assert released and released[0][0] == qpilots_fast.__version__ and all(date for _, date in released)


def test_the_source_archive_holds_what_a_build_needs(tmp_path: Path):
    """Without the native sources it would install as pure Python, and say nothing."""
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert len(sources) > 50 and sources | {"CMakeLists.txt", "setup.py", "pyproject.toml"} <= names
