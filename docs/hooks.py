"""Links from a page to a file of the repository outside docs/: the site gets a copy of the file.

On GitHub such a link leads to the file itself.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
FOLDER = "repository"
_LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)")


def on_files(files: Files, config: dict) -> Files:
    """Adds the files that pages link to."""
    for page in list(files.documentation_pages()):
        for _, link in _LINK.findall(page.content_string):
            if path := _outside(page, link):
                copy = f"{FOLDER}/{path}"
                if files.get_file_from_path(copy) is None:
                    files.append(File.generated(config, copy, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page, config: dict, files: Files) -> str:
    """Leads the links to the copies."""

    def lead(found: re.Match[str]) -> str:
        path = _outside(page.file, found[2])
        if path is None:
            return found[0]
        here = posixpath.dirname(page.file.src_uri)
        return found[1] + posixpath.relpath(f"{FOLDER}/{path}", here or ".")

    return _LINK.sub(lead, markdown)


def _outside(page: File, link: str) -> str | None:
    """The path in the repository of what is linked; None if that is a page, or is not there."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.src_uri), link))
    inside = path.startswith(("docs/", "../"))
    return None if inside or not (ROOT / path).is_file() else path
