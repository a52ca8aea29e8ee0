"""The tests of the examples need the libraries of the examples."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def libraries():
    for name in ("PIL", "safetensors", "sklearn", "tensorboard", "torchvision", "yaml"):
        pytest.importorskip(name)


@pytest.fixture(autouse=True)
def event_files_in_order(libraries, monkeypatch):
    """TensorBoard sorts the files of one second by a counter in their names, as text: 10 would come before 9."""
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
