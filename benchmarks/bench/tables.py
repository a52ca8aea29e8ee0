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


def quantiles_column(digits, scale=1e3, alone=None):
    """The column beside a median; `alone` is the text where a step was timed once, and not in turn with others."""

    def text(row):
        if alone and not row.get("rounds"):
            return alone
        return f"{row['seconds_20'] * scale:.{digits}f}-{row['seconds_80'] * scale:.{digits}f}"

    return Column("20-80 %", text)


def table_of(columns, rows, failure=None, least=None):
    """The table of `rows`; the cells of a row for which `failure(row)` is a list are that list and nothing after it."""
    cells = [failure(row) if failure else None for row in rows]
    cells = [line or [c.cell(row) for c in columns] for line, row in zip(cells, rows, strict=True)]
    return table([column.title for column in columns], cells, least)


def table(header, rows, least=None):
    """A table of texts, all but the first two columns to the right; `least`: how wide each column is at least."""
    rows = [header, *(row + [""] * (len(header) - len(row)) for row in rows)]
    widths = [max(w, *(len(row[i]) for row in rows)) for i, w in enumerate(least or [3] * len(header))]
    rule = ["-" * w if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    rows.insert(1, rule)
    form = "| " + " | ".join(f"{{:{'<' if i < 2 else '>'}{w}}}" for i, w in enumerate(widths)) + " |"
    return "\n".join(form.format(*row) for row in rows)


def listed(lines):
    return "\n".join(f"- {line}" for line in lines)


def paragraphs(*parts):
    """The parts that are not empty, with an empty line between them."""
    return "\n\n".join(part for part in parts if part)


def first_line(error):
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}"
