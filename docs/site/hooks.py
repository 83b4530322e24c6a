"""What mkdocs cannot know: pages that lie outside docs/, pages that the code makes, and links between all of them.

In the repository, links are paths from file to file. On the site they are the same, to the page that shows the file:
a source file that a page links to has a page of its own.
"""

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
MADE = Path(os.environ.get("FEATCACHE_PAGES", ROOT / "build" / "pages"))  # what make_pages.py left
OUTSIDE = {  # {file of the repository: page of the site}
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "data/README.md": "layout.md",
}
_LANGUAGES = {".py": "python", ".toml": "toml"}
_CODE = re.compile(r"(^```.*?^```$|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)((?:#[^)\s]*)?)(?=\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that docs/ does not have."""
    for path, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    for path in sorted(one for one in MADE.rglob("*") if one.is_file()):
        files.append(File.generated(config, path.relative_to(MADE).as_posix(), abs_src_path=str(path)))
    for path in sorted(set(_sources(files))):
        files.append(File.generated(config, _page_of(path), content=_source_page(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite the links of a page from files of the repository to pages of the site."""
    return relinked(markdown, page.file.src_uri)


def relinked(markdown: str, page: str) -> str:
    """The text of a page, with links to pages of the site. page : its path on the site"""
    here = _repository_path(page)

    def to_page(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link[1]))
        return posixpath.relpath(_page_of(target), posixpath.dirname(page) or ".") + link[2]

    parts = _CODE.split(markdown)
    parts[::2] = [_LINK.sub(to_page, text) for text in parts[::2]]
    return "".join(parts)


def _repository_path(page: str) -> str:
    """Path in the repository of a page of the site."""
    outside = {shown: path for path, shown in OUTSIDE.items()}
    return outside.get(page, f"docs/{page}")


def _page_of(path: str) -> str:
    """Page of the site that shows a file of the repository, or the index of a folder."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    if path.endswith(".ipynb"):  # shown with what its cells print
        path = path.removesuffix(".ipynb") + ".md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/") + ("/README.md" if (ROOT / path).is_dir() else "")
    return f"source/{path}.md"


def _sources(files: Files) -> Iterator[str]:
    """Files of the repository, outside docs/, that pages link to."""
    for file in files.documentation_pages():
        here = posixpath.dirname(_repository_path(file.src_uri))
        for text in _CODE.split(file.content_string)[::2]:
            for link in _LINK.finditer(text):
                path = posixpath.normpath(posixpath.join(here, link[1]))
                if path not in OUTSIDE and not path.startswith("docs/") and (ROOT / path).is_file():
                    yield path


def _source_page(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    fence = "`" * 4
    return (
        f"---\ntitle: {path}\nsearch:\n  exclude: true\n---\n\n"
        f"# `{path}`\n\n{fence}{_LANGUAGES.get(Path(path).suffix, 'text')}\n{text}{fence}\n"
    )
