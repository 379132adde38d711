"""What `make docs` does besides: copies of files that pages link to, and whole texts of "Returns".

Links lead to files of the repository outside docs/, too; on GitHub to the files themselves, on the
site to a copy of each. A Markdown file, such as a report beside its results, becomes a page, whose
own links are treated alike.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
COPIES = "repository/"
_LINK = re.compile(r"(\]\()([^)#\s:]+)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the files that pages link to, and those that these link to."""
    todo = list(files.documentation_pages())
    while todo:
        page = todo.pop()
        for _, link in _LINK.findall(page.content_string):
            target = _target(page.src_uri, link)
            if target is None or files.get_file_from_path(COPIES + target):
                continue
            copy = File.generated(
                config,
                COPIES + target,
                abs_src_path=str(ROOT / target),
                inclusion=InclusionLevel.NOT_IN_NAV,
            )
            files.append(copy)
            todo += [copy] if copy.is_documentation_page() else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Leads the links to the copies, and those of copies to the pages."""
    here = page.file.src_uri

    def lead(found: re.Match[str]) -> str:
        target = _target(here, found[2])
        if target is not None:
            return found[1] + posixpath.relpath(COPIES + target, posixpath.dirname(here) or ".")
        if here.startswith(COPIES):
            path = _path(here, found[2]).removeprefix("docs/")
            return found[1] + posixpath.relpath(path, posixpath.dirname(here))
        return found[0]

    return _LINK.sub(lead, markdown)


def _path(page: str, link: str) -> str:
    """The path in the repository of what a page of the site links to."""
    origin = page.removeprefix(COPIES) if page.startswith(COPIES) else f"docs/{page}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))


def _target(page: str, link: str) -> str | None:
    """That path if it is a file outside docs/, else None."""
    path = _path(page, link)
    outside = not path.startswith(("docs/", "../", "/")) and (ROOT / path).is_file()
    return path if outside else None


class WholeReturns(griffe.Extension):
    """Docstrings say what is returned in sentences; their first words are no type."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Puts what was taken for a type back into the text."""
        sections = func.docstring.parsed if func.docstring else ()
        for section in sections:
            if section.kind is griffe.DocstringSectionKind.returns:
                for item in section.value:
                    if isinstance(item.annotation, str):
                        item.description = f"{item.annotation}: {item.description}"
                        item.annotation = func.returns
