"""A page of headings, texts, tables and pictures, in three forms: terminal, Markdown, HTML."""

import base64
import dataclasses
import html
from collections.abc import Sequence

from rich.table import Table

from experiments import terminal


@dataclasses.dataclass(frozen=True)
class Heading:
    """A heading; the first of a page is its title."""

    text: str


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Items:
    """A list, an item a paragraph."""

    items: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
      title: what stands over it.
      columns: their names.
      rows: cells as they are printed, one a column.
      left: names of the columns that are not of numbers.
      caption: what stands under it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: tuple[str, ...] = ()
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture beside the page, or in it.

    Attributes:
      file: its name.
      png: its bytes.
      text: what it shows.
    """

    file: str
    png: bytes
    text: str


Block = Heading | Text | Items | Grid | Picture


def view(grid: Grid) -> Table:
    """The table as rich prints it, its column names in lines of one word."""
    found = terminal.table(grid.title, grid.caption)
    names = [name.replace(" ", "\n") for name in grid.columns]
    terminal.add_columns(found, *names, left=tuple(name.replace(" ", "\n") for name in grid.left))
    for row in grid.rows:
        found.add_row(*row)
    return found


def to_terminal(blocks: Sequence[Block]) -> None:
    """Prints a page as wide as the terminal; pictures are left out."""
    console = terminal.console()
    for block in blocks:
        match block:
            case Heading(text):
                console.print(f"{text}\n", style="bold")
            case Text(text):
                terminal.say(text)
                print()
            case Items(items):
                for item in items:
                    terminal.say(f"- {item}")
                print()
            case Grid():
                console.print(view(block))
                print()
            case Picture():
                pass


def to_markdown(blocks: Sequence[Block]) -> str:
    """A page as GitHub's Markdown; pictures are files beside it."""
    parts, level = [], "#"
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"{level} {text}")
                level = "##"
            case Text(text):
                parts.append(text)
            case Items(items):
                parts.append("\n".join(f"- {item}" for item in items))
            case Grid():
                cells = [[cell.replace("|", "\\|") for cell in row] for row in block.rows]
                rules = ["---" if name in block.left else "---:" for name in block.columns]
                lines = [f"| {' | '.join(row)} |" for row in [block.columns, rules, *cells]]
                parts += [f"**{block.title}**", "\n".join(lines), block.caption]
            case Picture():
                parts.append(f"![{block.text}]({block.file})")
    return "\n\n".join(part for part in parts if part) + "\n"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .15rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }
th { border-bottom: 2px solid #999; vertical-align: bottom; }
th.left, td.left { text-align: left; }
.scroll { overflow-x: auto; }
.note { color: #555; font-size: 90%; }
img { max-width: 100%; height: auto; }
"""


def to_html(blocks: Sequence[Block]) -> str:
    """A page as one HTML file, pictures in it."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "")
    parts, level = [], "h1"
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"<{level}>{html.escape(text)}</{level}>")
                level = "h2"
            case Text(text):
                parts.append(f"<p>{html.escape(text)}</p>")
            case Items(items):
                lines = "\n".join(f"<li>{html.escape(item)}</li>" for item in items)
                parts.append(f"<ul>\n{lines}\n</ul>")
            case Grid():
                parts.append(_html_table(block))
            case Picture():
                data = base64.b64encode(block.png).decode("ascii")
                text = html.escape(block.text)
                parts.append(f'<p><img alt="{text}" src="data:image/png;base64,{data}"></p>')
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _html_table(grid: Grid) -> str:
    kinds = [' class="left"' if name in grid.left else "" for name in grid.columns]

    def line(cells: Sequence[str], tag: str) -> str:
        pairs = zip(cells, kinds, strict=True)
        return "<tr>" + "".join(f"<{tag}{k}>{html.escape(c)}</{tag}>" for c, k in pairs) + "</tr>"

    rows = "\n".join(line(row, "td") for row in grid.rows)
    note = f'\n<p class="note">{html.escape(grid.caption)}</p>' if grid.caption else ""
    head = f"<thead>{line(grid.columns, 'th')}</thead>"
    return (
        f'<div class="scroll"><table>\n<caption>{html.escape(grid.title)}</caption>\n'
        f"{head}\n<tbody>\n{rows}\n</tbody>\n</table></div>{note}"
    )
