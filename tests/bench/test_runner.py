"""Journals, processes with a time limit, and the watch over workers."""

import sys
import time
from types import SimpleNamespace

import pytest
from bench import BENCHMARKS
from bench.runner import process, worker
from bench.runner.journal import Findings, Journal


def test_journal_survives_the_process(journal):
    assert journal.begin("a", net="cifar")
    journal.row("a", seconds=1.0)
    journal.row("a", seconds=2.0, rounds=3)
    journal.begin("b", allow=7, net="densenet121")
    with open(journal.path, "a") as file:
        file.write('{"row": "b", "val')  # killed while it wrote
    found = Findings(journal.path)
    assert (found.current, found.allow, found.cell) == ("b", 7, {"net": "densenet121"})
    assert found.rows == {"a": {"seconds": 2.0, "rounds": 3}}
    again = Journal(journal.path)
    assert [again.begin(key) for key in "abc"] == [False, False, True]


def test_process_is_ended_at_its_limit(tmp_path):
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    started = time.monotonic()
    summary = process.Process(sleeping, tmp_path / "log", limit=0.3).wait().summary()
    assert time.monotonic() - started < 20
    assert summary["out_of_time"] and summary["status"] != 0


def test_process_that_does_not_listen_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "GRACE", 0.3)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    ended = process.Process([sys.executable, "-c", deaf], tmp_path / "log", limit=2).wait()
    assert ended.summary()["status"] == -9
    assert ended.tail() == ["on"]


class Scripted(worker.Worker):
    """A worker that runs a script in place of a benchmark, with its journal at hand."""

    def __init__(self, folder, script):
        self.script = script
        super().__init__("steps", folder, 60, {}, late=15)

    def command(self, seconds):
        head = f"import sys, time; sys.path.insert(0, {str(BENCHMARKS)!r})\nfrom bench.runner.journal import Journal\n"
        return [sys.executable, "-c", head + f"journal = Journal({str(self.journal)!r})\n" + self.script]


DIES = """
for cell in "abc":
    if journal.begin(cell, net="cifar"):
        if cell == "b":
            sys.exit("illegal memory access")
        journal.row(cell, seconds=1.0)
"""
STANDS_STILL = """
if journal.begin("a", allow=1):
    time.sleep(60)
journal.begin("b")
journal.row("b", seconds=1.0)
"""
ENDINGS = {  # script: (error of the cell, whole rows, last words of the note, starts)
    DIES: ({"b": {"net": "cifar", "error": "the process stopped"}}, "ac", "stopped in 'b': illegal memory access", 2),
    STANDS_STILL: (
        {"a": {"error": "the process stood still for 1 s"}},
        "b",
        "stood still for 1 s in 'a': no output",
        2,
    ),
    "raise ImportError('no library')": ({}, "", "stopped in 'None': ImportError: no library", 1),
}


@pytest.mark.parametrize("script", ENDINGS, ids=["dies", "stands still", "cannot start"])
def test_worker_that_fails_is_followed_by_one_that_goes_on(tmp_path, script):
    """The next one leaves the failed cell out; one that measured nothing is not started again."""
    failed, whole, said, starts = ENDINGS[script]
    scripted = Scripted(tmp_path, script)
    found = worker.follow(scripted)
    assert found.rows == failed | {cell: {"seconds": 1.0} for cell in whole}
    assert found.notes == [f"steps: a process {said}"]
    assert scripted.starts == starts


def test_follow_says_each_minute_how_far_it_is(journal, capsys):
    journal.fact("cells", 7)
    journal.begin("cifar fused", 60)
    for seconds_a_line, said in ((0, "default: 1 of 7 cells, 0 min, now cifar fused\n"), (60, "")):
        ending = SimpleNamespace(part="default", journal=journal.path, kill=lambda: None)
        ending.poll = iter((False, True)).__next__
        worker.follow(ending, seconds_a_line=seconds_a_line)
        printed = capsys.readouterr().err
        assert printed.startswith(said) and bool(printed) == bool(said)
