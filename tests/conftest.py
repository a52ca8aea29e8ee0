"""Every test starts from the same seed, and fails if the fused implementation falls back.

If pytest-xdist is installed, tests run in as many processes as there are cores, unless -n says otherwise. Without
--thorough, tests that take long run with fewer of their parameters.
"""

import gc
import os
from collections import Counter

import pytest

# With these options somebody watches a test, or lists tests without running them.
WATCHING = ("usepdb", "trace", "collectonly", "setuponly", "setupplan", "showfixtures", "show_fixtures_per_test")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads its options here, too
def pytest_cmdline_main(config):
    """Run a process for each core, unless the command line has a number, names a single test, or watches tests."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # this is such a process, or was started by a test in one
        return
    # Processes that tests start inherit this. Every core has a process already, and spinning threads would take it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not config.pluginmanager.hasplugin("xdist") or config.getoption("numprocesses") is not None:
        return
    single = len(config.args) == 1 and "::" in config.args[0]
    if single or config.getoption("capture") == "no" or any(config.getoption(name, False) for name in WATCHING):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores > 1 and config.getoption("dist") == "no":
        config.option.numprocesses, config.option.dist = cores, "worksteal"


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="every repetition of what takes long")
    group = parser.getgroup("fuzz", "random networks, tests/fuzz")
    group.addoption("--networks", type=int, default=20, help="how many random networks")
    group.addoption("--first-seed", type=int, default=0, help="seed of the first of them")
    group.addoption("--seed", type=int, help="the random network of that seed alone")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    config.addinivalue_line("markers", "repetitions(n): without --thorough the first n parameters are enough")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--thorough") or any("[" in argument for argument in config.args):
        return
    chosen, left_out, seen = [], [], Counter()
    for item in items:
        marker = item.get_closest_marker("repetitions")
        function = item.nodeid.partition("[")[0]
        seen[function] += 1
        (left_out if marker and seen[function] > marker.args[0] else chosen).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = chosen


def pytest_collection_finish():
    gc.freeze()  # benchmarks collect garbage before each measurement, which is faster without all modules


@pytest.fixture(autouse=True)
def fixed_state():
    """Set a fixed seed, fallback to an error, and one thread: most tests are too small for more."""
    import torch  # here, because the process that distributes the tests does not need it

    import densenet_ext

    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    densenet_ext.set_fallback("error")
    yield
    densenet_ext.set_fallback("warn")
    torch.set_num_threads(threads)
