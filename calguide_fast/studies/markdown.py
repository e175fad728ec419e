"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures, with cells padded to columns."""
    widths = [max(3, *(len(row[c]) for row in (headings, *rows))) for c in range(len(headings))]
    rule = ["-" * width if c == 0 else "-" * (width - 1) + ":" for c, width in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.ljust(w) if c == 0 else cell.rjust(w) for c, (cell, w) in enumerate(zip(cells, widths))]
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(line, (headings, rule, *rows))) + "\n"
