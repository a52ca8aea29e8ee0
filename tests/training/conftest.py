"""The tests of the examples need the libraries of the examples."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def libraries():
    for name in ("PIL", "safetensors", "sklearn", "tensorboard", "torchvision", "yaml"):
        pytest.importorskip(name)
