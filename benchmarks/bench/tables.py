"""Markdown tables with aligned columns, and the cells of a row of results."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A column of a table: `value` is a key of the row or a function of it, None is an empty cell."""

    title: str
    value: str | Callable
    form: str = "{}"
    scale: float | None = None

    def cell(self, row):
        value = self.value(row) if callable(self.value) else row.get(self.value)
        if value is None or value == "":
            return ""
        return self.form.format(value if self.scale is None else value * self.scale)


def table_of(columns, rows, failure=None):
    """The table of `rows`; the cells of a row for which `failure(row)` is a list are that list and nothing after it."""
    cells = []
    for row in rows:
        line = failure(row) if failure else None
        if line is None:
            line = [column.cell(row) for column in columns]
        cells.append(line + [""] * (len(columns) - len(line)))
    return table([column.title for column in columns], cells)


def quantiles_column(digits, scale=1e3):
    return Column("20-80 %", lambda row: quantiles_text(row, digits, scale))


def quantiles_text(row, digits, scale=1.0):
    return f"{row['seconds_20'] * scale:.{digits}f}-{row['seconds_80'] * scale:.{digits}f}"


def table(header, rows):
    """A table whose cells are text, all but the first two columns to the right."""
    widths = [max(3, *(len(row[i]) for row in [header, *rows])) for i in range(len(header))]
    return "\n".join([*table_head(header, widths), *(table_row(row, widths) for row in rows)])


def table_head(header, widths):
    """The first two lines of a table, whose rows may come one by one."""
    rule = ["-" * w if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return [table_row(header, widths), table_row(rule, widths)]


def table_row(cells, widths):
    cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))]
    return "| " + " | ".join(cells) + " |"


def listed(lines):
    return "\n".join(f"- {line}" for line in lines)


def paragraphs(*parts):
    """The parts that are not empty, with an empty line between them."""
    return "\n\n".join(part for part in parts if part)


def first_line(error):
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}"
