"""The site: what its API pages show says what it takes and raises; it builds without a warning."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
API = sorted(set((ROOT / "docs" / "api").glob("*.md")) - {ROOT / "docs" / "api" / "backends.md"})
Documented = ast.FunctionDef | ast.ClassDef


def shown() -> dict[str, Documented]:
    """Every class and function that an API page names, and the public functions of what it names."""
    named = [name for page in API for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)]
    return {name: node for target in named for name, node in _of(target)}


def _of(target: str) -> Iterator[tuple[str, Documented]]:
    module, names = target, []
    while not (path := _source(module)).exists():
        module, _, last = module.rpartition(".")
        names.append(last)
    body = ast.parse(path.read_text()).body
    for node in body:
        if isinstance(node, Documented) and not node.name.startswith("_") and (not names or node.name in names):
            yield f"{module}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                for part in node.body:
                    if (
                        isinstance(part, ast.FunctionDef)
                        and not part.name.startswith("_")
                        and not _inherits(node, part)
                    ):
                        yield f"{module}.{node.name}.{part.name}", part


def _inherits(owner: ast.ClassDef, method: ast.FunctionDef) -> bool:
    """Whether a method may be described where it is first declared."""
    return bool(owner.bases) and ast.get_docstring(method) is None


def _source(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def parameters(node: ast.FunctionDef) -> set[str]:
    listed = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return {argument.arg for argument in listed} - {"self", "cls"}


@pytest.mark.parametrize(("name", "node"), shown().items(), ids=shown())
def test_what_the_api_pages_show_says_what_it_takes_and_raises(name: str, node: Documented):
    if any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list):
        return
    text = ast.get_docstring(node) or ""
    assert text
    if isinstance(node, ast.ClassDef):
        makers = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
        assert all(re.search(rf"\b{taken}\b", text) for maker in makers for taken in parameters(maker))
        return
    if "Args:" in text:
        missing = {taken for taken in parameters(node) if not re.search(rf"^    {taken}: ", text, re.MULTILINE)}
        assert not missing or "Other arguments" in text
    raises = [part for part in ast.walk(node) if isinstance(part, ast.Raise) and part.exc is not None]
    assert not raises or node.name == "forward" or "Raises:" in text or text.startswith("Raises")


def test_the_api_pages_show_everything_public():
    import qpilots_fast
    from qpilots_fast import integrations, networks, objectives, ops

    modules = {"heads", "networks", "objectives", "ops"}
    names = {name.rpartition(".")[2] for name in shown()}
    assert set(qpilots_fast.__all__) - modules <= names and modules < set(qpilots_fast.__all__)
    assert set(integrations.__all__) | set(ops.__all__) <= names
    assert {"td_loss", "iql_loss", "meta_flow_map_loss"} <= names and hasattr(objectives, "td_loss")
    assert {"FlowMLP", "CriticEnsemble"} <= names and hasattr(networks, "FlowMLP")


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r"^ +- [^:]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages | {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} == named


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="`make docs` installs MkDocs")
def test_the_site_builds_without_a_warning(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "norm match" in (tmp_path / "api" / "ops" / "index.html").read_text()
