"""The findings of a measuring process as lines of JSON: a process that crashes, hangs or is killed loses nothing.

Before a cell is measured its key is written, with the seconds that it may take; afterwards its row. A process that takes
over from one that died leaves out every cell that was begun, and the one left unfinished is the one that failed.
"""

import json
import os
from pathlib import Path


class Journal:
    """The journal of a process. `previous` are the findings of one that died, `begun` the cells of both."""

    def __init__(self, path):
        self.path = Path(path)
        self.previous = Findings(path)
        self.begun = set(self.previous.begun)

    def begin(self, key, allow=60, **cell):
        """Note that `key` is measured next and may take `allow` seconds; False where it was begun already.

        `cell` is the beginning of its row if the process dies.
        """
        if key in self.begun:
            return False
        self.begun.add(key)
        self._write({"begin": key, "allow": allow, "cell": cell})
        return True

    def died(self, why):
        """End the cell that a process left unfinished; returns its key, None where there is none."""
        found = Findings(self.path)
        if found.current is not None:
            self.row(found.current, **found.cell, error=why)
        return found.current

    def row(self, key, **values):
        """Write what was found; a later row of the same key adds to it."""
        self._write({"row": key, "values": values})

    def note(self, text):
        self._write({"note": text})

    def fact(self, name, value):
        self._write({"fact": name, "value": value})

    def _write(self, entry):
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Findings:
    """A journal read: cells begun, rows by key, notes, facts, and the cell left unfinished."""

    def __init__(self, path):
        self.begun, self.rows, self.notes, self.facts = [], {}, [], {}
        self.current, self.allow, self.cell = None, 60, {}
        for line in Path(path).read_text().splitlines() if Path(path).exists() else ():
            try:
                self._add(json.loads(line))
            except json.JSONDecodeError:
                break  # the last line of a process that was killed while it wrote

    def _add(self, entry):
        if "begin" in entry:
            self.current, self.allow, self.cell = entry["begin"], entry["allow"], entry["cell"]
            self.begun.append(entry["begin"])
        elif "row" in entry:
            self.rows.setdefault(entry["row"], {}).update(entry["values"])
            self.current = None if self.current == entry["row"] else self.current
        elif "fact" in entry:
            self.facts[entry["fact"]] = entry["value"]
        else:
            self.notes.append(entry["note"])

    def rows_with(self, key):
        """The rows of cells, without those that only end a part."""
        return [row for row in self.rows.values() if key in row]
