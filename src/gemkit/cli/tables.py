"""Tables on stdout: aligned, wrapped to the terminal, plain when piped."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence

PIPED_WIDTH = 120  # columns where there is no terminal to ask


def width() -> int:
    """Columns to write into: the terminal's, `COLUMNS` where it is set, or `PIPED_WIDTH`."""
    if sys.stdout.isatty():
        return os.get_terminal_size(sys.stdout.fileno()).columns
    return int(os.environ.get("COLUMNS", PIPED_WIDTH))


def print_table(
    columns: Sequence[tuple[str, str]], groups: Iterable[tuple[str, Iterable[Sequence[str]]]], fixed: int = 1
) -> None:
    """Print rows under headings.

    Args:
        columns: heading and alignment ("left" or "right") of each.
        groups: heading of a group, and its rows.
        fixed: this many first columns are never wrapped.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i, (heading, side) in enumerate(columns):
        table.add_column(
            heading,
            justify="right" if side == "right" else "left",
            no_wrap=i < fixed,
            min_width=len(heading),
            overflow="fold",
        )
    for heading, rows in groups:
        table.add_row(Text(heading, style="dim"))
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))  # Text: a "[" in a label is not markup
    console = Console(width=width(), highlight=False)
    with console.capture() as printed:
        console.print(table)
    for line in printed.get().splitlines():
        print(line.rstrip())  # cells are padded to their column, which a pipe has no use for
