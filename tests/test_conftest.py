"""The command line decides in how many processes tests run, and which tests."""

import os

import conftest
import pytest

EVERYTHING, ONE = "tests/package/test_errors.py", "tests/package/test_errors.py::test_call"
PROCESSES = {  # the number that pytest-xdist gets; with None it does nothing
    "everything": ([EVERYTHING], 3),
    "some": ([EVERYTHING, "-k", "layers"], 3),
    "as said": ([EVERYTHING, "-n", "2"], 2),
    "none, as said": ([EVERYTHING, "-n", "0"], 0),
    "single": ([ONE], None),
    "several that are named": ([ONE, EVERYTHING + "::test_constructor"], 3),
    "pdb": ([EVERYTHING, "--pdb"], None),
    "collect only": ([EVERYTHING, "--collect-only"], None),
    "output as it comes": ([EVERYTHING, "-s"], None),
}


@pytest.fixture
def configure(request, monkeypatch):
    """The options that pytest gets from a command line on a machine with three cores."""
    pytest.importorskip("xdist")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 5}, raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it afterwards
        monkeypatch.delenv(name)

    def configure(arguments):
        config = type(request.config).fromdictargs({}, [f"--rootdir={request.config.rootpath}", *arguments])
        conftest.pytest_cmdline_main(config)
        return config

    return configure


@pytest.mark.parametrize(("arguments", "processes"), PROCESSES.values(), ids=PROCESSES)
def test_processes(configure, arguments, processes):
    assert configure(arguments).option.numprocesses == processes
    assert (os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"]) == ("1", "PASSIVE")


def test_a_process_starts_no_others(configure, monkeypatch):
    """Otherwise a test that starts pytest would start processes, which start more."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    assert configure([EVERYTHING]).option.numprocesses is None


def test_one_core_needs_one_process(configure, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    assert configure([EVERYTHING]).option.numprocesses is None


class Item:
    def __init__(self, name, *marks):
        self.nodeid, self.marks = f"tests/package/test_errors.py::{name}", marks

    def get_closest_marker(self, name):
        return next((mark for mark in self.marks if mark.name == name), None)


@pytest.mark.parametrize(
    ("arguments", "left"),
    [([EVERYTHING], ["a[1]", "a[2]", "b[1]"]), ([EVERYTHING, "--thorough"], None), ([f"{ONE}[1]"], None)],
)
def test_repetitions_are_left_out(configure, arguments, left):
    """--thorough runs all repetitions, and a test's name runs the one that it names."""
    once = pytest.mark.repetitions(1).mark
    names = {"a[1]": (), "a[2]": (), "b[1]": (once,), "b[2]": (once,)}
    items = [Item(name, *marks) for name, marks in names.items()]
    conftest.pytest_collection_modifyitems(configure(arguments), items)
    assert [item.nodeid.partition("::")[2] for item in items] == (left or list(names))
