"""A digest of the code that a module runs, for results that are out of date when it changes."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
_PACKAGE = "pallas_kernels"


def imported(modules: Iterable[str], root: Path = ROOT) -> list[str]:
    """`modules` and all that they import of `pallas_kernels`, at any depth, sorted.

    What a package's `__init__.py` imports counts where the package itself is imported from, not
    where one of its modules is: that one op is exported beside another says nothing of it.

    Args:
      modules: dotted names.
      root: the folder that `pallas_kernels` is in.
    """
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _imports(_file(name, root).read_text(encoding="utf-8"), root)
    return sorted(found)


def digest(modules: Iterable[str], root: Path = ROOT) -> str:
    """Digest of the program in `modules` and all they import, alike on every version of Python.

    Comments, docstrings and layout do not count.
    """
    text = hashlib.sha256()
    for name in imported(modules, root):
        text.update(f"{name}\0{_program(_file(name, root).read_text(encoding='utf-8'))}\0".encode())
    return text.hexdigest()[:16]


def _file(module: str, root: Path) -> Path:
    path = root.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _imports(source: str, root: Path) -> Iterator[str]:
    """The modules of the package that a source imports; imports are absolute here."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if _ours(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.module and _ours(node.module):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if _file(inner, root).is_file() else node.module


def _ours(module: str) -> bool:
    return module.split(".")[0] == _PACKAGE


@functools.cache
def _program(source: str) -> str:
    """A source's syntax tree as text, without docstrings.

    Not `ast.dump` or `ast.unparse`, whose text depends on the version of Python.
    """
    return _text(ast.parse(source))


def _text(node: object) -> str:
    if isinstance(node, list):
        return f"[{' '.join(map(_text, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = [type(node).__name__]
    for name, value in ast.iter_fields(node):
        if name == "body" and _has_docstring(node):
            value = value[1:]
        if isinstance(node, ast.JoinedStr):  # Python 3.12.1 adds pieces that are empty
            value = [x for x in value if not (isinstance(x, ast.Constant) and x.value == "")]
        if value not in (None, []):  # which fields there are, when empty, depends on the version
            parts.append(f"{name}={_text(value)}")
    return f"({' '.join(parts)})"


def _has_docstring(node: ast.AST) -> bool:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None
