"""Targets: the figures that are to be reached, and the verdicts on those that were measured."""

from dataclasses import asdict, dataclass

from bench.tables import Column, table_of


@dataclass(frozen=True)
class Target:
    name: str
    wanted: str = ""  # empty: the figure is only shown
    found: float | None = None  # None: not measured
    reached: bool | None = None

    @classmethod
    def at_least(cls, name, limit, found):
        """A target; without a limit the figure is only shown."""
        if limit is None:
            return cls(name, found=found)
        return cls(name, f">= {limit:g}", found, None if found is None else found >= limit)

    @classmethod
    def at_most(cls, name, limit, found):
        return cls(name, f"<= {limit:g}", found, None if found is None else found <= limit)

    @property
    def verdict(self):
        return {True: "reached", False: "missed", None: "not measured"}[self.reached]

    def row(self):
        return asdict(self) | {"verdict": self.verdict}


def targets_table(rows):
    """The table of `Target.row`s."""
    return table_of(
        [
            Column("target", "name"),
            Column("wanted", "wanted"),
            Column("found", "found", "{:.2f}"),
            Column("", lambda t: t["verdict"] if t["wanted"] else None),
        ],
        rows,
    )
