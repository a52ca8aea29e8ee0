"""A part of a benchmark in a process of its own, and the watch over it.

A kernel that reads where it must not costs its process the device, one that waits for ever never returns. So each part
is a process that keeps a journal, and one that dies or stands still is followed by another that leaves out its cell.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from bench.runner.journal import Findings, Journal
from bench.runner.process import Process

RESTARTS = 4
STARTING = 60  # seconds until the first line of a journal, beside those that a cell may take


def add_options(parser, parts):
    """The option for what processes leave, and those that only a worker gets."""
    parser.add_argument("--logs", metavar="FOLDER", type=Path, help="keep what the processes print, and their journals")
    parser.add_argument("--worker", choices=parts, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)


@contextlib.contextmanager
def new_folder(logs):
    """The folder of logs and journals: `logs`, without the journals of an earlier run, or one that is removed at the end."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(logs or scratch).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for journal in folder.glob("*.jsonl"):
            journal.unlink()
        yield folder


class Worker:
    """The command line of this process with --worker; one that dies or stands still is started again.

    late: seconds after the deadline that the last cell may take.
    """

    def __init__(self, part, folder, seconds, environment, late):
        self.part, self.folder, self.environment, self.late = part, folder, environment, late
        self.journal = folder / f"{part}.jsonl"
        self.deadline, self.starts, self.begun = time.monotonic() + seconds, 0, 0
        self.size, self.allow = 0, 60  # bytes of the journal; seconds that its cell may take
        self.start()

    def start(self):
        self.starts += 1
        seconds, self.changed = self.deadline - time.monotonic(), time.monotonic()
        log = self.folder / f"{self.part}.{self.starts}.log"
        self.process = Process(self.command(seconds), log, seconds + self.late, self.environment)

    def command(self, seconds):
        worker = ["--worker", self.part, "--folder", self.folder, "--seconds", f"{seconds:.0f}"]
        return [sys.executable, Path(sys.argv[0]).resolve(), *sys.argv[1:], *worker]

    def poll(self):
        """True if there is nothing left to wait for."""
        if self.process.poll():
            return self.process.status == 0 or not self.take_over("stopped")
        size = self.journal.stat().st_size if self.journal.exists() else 0
        if size != self.size:
            self.size, self.changed, self.allow = size, time.monotonic(), Findings(self.journal).allow
        elif time.monotonic() > self.changed + self.allow + STARTING * (size == 0):
            self.kill()
            return not self.take_over(f"stood still for {self.allow} s")
        return False

    def kill(self):
        self.process.kill()

    def take_over(self, what):
        """Note what happened; True if another process goes on."""
        said, journal = self.process.tail(1), Journal(self.journal)
        cell = journal.died(f"the process {what}")
        journal.note(f"{self.part}: a process {what} in '{cell}': {said[0][:300] if said else 'no output'}")
        begun, self.begun = self.begun, len(journal.begun)
        # One that died before it measured anything is as the next one would be.
        goes_on = self.begun > begun and self.starts <= RESTARTS and time.monotonic() <= self.deadline - 15
        if goes_on:
            self.start()
        return goes_on


def follow(worker, read=lambda found: None, seconds_a_line=60):
    """Wait for a worker; returns its findings, each time read anew and given to `read`.

    A bar tells how far it is; a line each minute where there is no terminal.
    """
    began = said = time.monotonic()
    try:
        with tqdm(desc=worker.part, unit="cell", disable=None) as progress:
            ended = False
            while not ended:
                ended = worker.poll()
                found = Findings(worker.journal)
                read(found)
                progress.total = found.facts.get("cells")
                progress.update(len(found.begun) - progress.n)
                if progress.disable and time.monotonic() - said >= seconds_a_line:
                    said = time.monotonic()
                    count = f"{len(found.begun)} of {found.facts.get('cells', '?')} cells"
                    minutes, cell = (said - began) / 60, found.current or "between cells"
                    print(f"{worker.part}: {count}, {minutes:.0f} min, now {cell}", file=sys.stderr, flush=True)
                time.sleep(0.5)  # it runs beside what is timed
    finally:
        worker.kill()
    return found
