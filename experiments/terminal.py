"""What the commands print, as wide as the terminal is; 80 columns where there is none."""

import functools
import shutil
import textwrap

from rich import box
from rich.console import Console
from rich.table import Table


def console() -> Console:
    """A console as wide as the terminal; "[aot]" is text, no markup."""
    return Console(width=shutil.get_terminal_size().columns, highlight=False, markup=False)


def say(text: str) -> None:
    """Prints a text in lines as wide as the terminal; words, and so paths, stay whole."""
    wrapper = textwrap.TextWrapper(
        width=shutil.get_terminal_size().columns,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    print(wrapper.fill(text))


def help_text(text: str) -> str:
    """A command's description in lines as wide as the terminal; examples, which are indented, stay
    lines of their own.

    All but the first of a paragraph begin with a space: tyro joins what begins with a letter to
    the line before.
    """
    wrap = functools.partial(
        textwrap.wrap,
        width=shutil.get_terminal_size().columns,
        break_long_words=False,
        break_on_hyphens=False,
    )
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith(" ") or "\n    " in paragraph:
            for line in paragraph.splitlines():
                lines += wrap(line, initial_indent=" ", subsequent_indent="        ")
        else:
            words = " ".join(paragraph.split())
            lines += wrap(words, subsequent_indent="  ")
        lines.append("")
    return "\n".join(lines).rstrip()


def table(title: str = "", caption: str = "") -> Table:
    """An empty table whose columns take little room; nothing in it is ever cut off."""
    return Table(
        title=title or None,
        caption=caption or None,
        caption_justify="left",
        box=box.SIMPLE,
        show_edge=False,
        pad_edge=False,
        padding=0,
    )


def add_columns(view: Table, *names: str, left: tuple[str, ...] = ()) -> None:
    """Adds columns: of numbers, at the right, but for those named in `left`."""
    for name in names:
        view.add_column(name, justify="left" if name in left else "right", overflow="fold")
