"""Targets: the figures that are to be reached, and the verdicts on those that were measured."""

from bench.tables import Column, table_of


def target(name, found, least=None, most=None):
    """The row of one target. A figure that was not `found` is None; without a limit it is only shown."""
    wanted, reached = "", None
    if least is not None or most is not None:
        wanted = f">= {least:g}" if most is None else f"<= {most:g}"
        if found is not None:
            reached = found >= least if most is None else found <= most
    verdict = {True: "reached", False: "missed", None: "not measured"}[reached]
    return {"name": name, "wanted": wanted, "found": found, "reached": reached, "verdict": verdict}


COLUMNS = (
    Column("target", "name"),
    Column("wanted", "wanted"),
    Column("found", "found", "{:.2f}"),
    Column("", lambda row: row["verdict"] if row["wanted"] else None),
)


def targets_table(rows):
    return table_of(COLUMNS, rows)
