"""Every test starts from the same seed, and fails where the fused implementation quietly is not used."""

import pytest
import torch

import densenet_ext


def pytest_addoption(parser):
    group = parser.getgroup("fuzz", "random networks, tests/fuzz")
    group.addoption("--networks", type=int, default=40, help="how many random networks")
    group.addoption("--first-seed", type=int, default=0, help="seed of the first of them")
    group.addoption("--seed", type=int, help="the random network of that seed alone")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


@pytest.fixture(autouse=True)
def fixed_state():
    """A fixed seed, fallback as an error, and one thread: most tests are too small for more."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    densenet_ext.set_fallback("error")
    yield
    densenet_ext.set_fallback("warn")
    torch.set_num_threads(threads)
