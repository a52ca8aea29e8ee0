"""Random networks by every implementation: outputs, gradients and statistics of two steps.

pytest tests/fuzz                                      20 networks
pytest tests/fuzz --networks 2000 -n 2                 2000 networks, in two processes
pytest tests/fuzz --networks 2000 --first-seed 2000    2000 others
pytest tests/fuzz/test_networks.py --seed 17           the network of that seed alone, described

Some networks run in several threads. If cores are busy with something else, OMP_WAIT_POLICY=PASSIVE makes these many
times as fast: their threads do not spin while they wait for a thread that has no core.
"""

import traceback

import pytest

from fuzz.compare import differences
from fuzz.draw import draw_network

CHUNK = 10


def pytest_generate_tests(metafunc):
    if "seeds" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    first, count = option("--first-seed"), option("--networks")
    if option("--seed") is not None:
        first, count = option("--seed"), 1
    chunks = [range(i, min(i + CHUNK, first + count)) for i in range(first, first + count, CHUNK)]
    metafunc.parametrize("seeds", chunks, ids=[f"{chunk[0]}-{chunk[-1]}" for chunk in chunks])


def test_equals_plain(seeds, request, capsys):
    failures = []
    for seed in seeds:
        network = draw_network(seed)
        if request.config.getoption("--seed") is not None:
            with capsys.disabled():
                print(f"\n{network}")
        try:
            lines = differences(network)
        except Exception:  # an error of one network does not end the run of the others
            lines = [traceback.format_exc()]
        if lines:
            found = "\n".join(f"  {line}" for line in lines)
            failures.append(f"seed {seed}, alone: pytest tests/fuzz/test_networks.py --seed {seed}\n{network}\n{found}")
    if failures:
        pytest.fail("\n\n".join(failures), pytrace=False)
