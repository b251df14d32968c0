"""The site's pages that lie outside docs/: README.md as its front, and every file that a page links to.

A hook of MkDocs (mkdocs.yml). Markdown becomes a page as it is, any other text file a page that shows it, so that all
links stay on the site and `mkdocs build --strict` checks them.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)\s#]+)(?=[)#])")
_LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".toml": "toml"}
_PICTURES = (".png", ".svg")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what the pages link to, page by page, as a linked page may link further."""
    waiting = [ROOT / "README.md", *(Path(file.abs_src_path) for file in files.documentation_pages())]
    seen = set(waiting)
    while waiting:
        source = waiting.pop()
        if not source.is_relative_to(config.docs_dir):
            _add(files, config, source)
        if source.suffix == ".md":
            new = {path for link in _LINK.findall(source.read_text()) if (path := _target(source, link))} - seen
            seen |= new
            waiting += sorted(new)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to files of the repository into links to their pages."""
    source = ROOT / page.file.src_uri
    if not source.exists():
        source = Path(config.docs_dir) / page.file.src_uri

    def on_site(match: re.Match[str]) -> str:
        target = _target(source, match[1])
        if target is None:
            return match[1]
        return posixpath.relpath(_uri(target, config), posixpath.dirname(page.file.src_uri) or ".")

    return _LINK.sub(on_site, markdown)


def _target(source: Path, link: str) -> Path | None:
    """The file of the repository that a page's link leads to."""
    path = Path(os.path.normpath(source.parent / link))
    return path if path.is_file() and path.is_relative_to(ROOT) else None


def _uri(source: Path, config: MkDocsConfig) -> str:
    """Where a file of the repository lies among the site's sources."""
    if source.is_relative_to(config.docs_dir):
        return source.relative_to(config.docs_dir).as_posix()
    shown = source.suffix == ".md" or source.suffix in _PICTURES
    return source.relative_to(ROOT).as_posix() + ("" if shown else ".md")


def _add(files: Files, config: MkDocsConfig, source: Path) -> None:
    uri = _uri(source, config)
    if source.suffix == ".md" or source.suffix in _PICTURES:
        files.append(File.generated(config, uri, abs_src_path=str(source), inclusion=InclusionLevel.NOT_IN_NAV))
        return
    name = source.relative_to(ROOT).as_posix()
    text = f"# {name}\n\n````{_LANGUAGES.get(source.suffix, 'text')}\n{source.read_text()}\n````\n"
    files.append(File.generated(config, uri, content=text, inclusion=InclusionLevel.NOT_IN_NAV))
