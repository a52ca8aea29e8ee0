"""The lines of bench/gpu/device.py that only a GPU runs, over stand-ins that record what is called."""

from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from bench.gpu import device as gpu_device


@pytest.fixture
def cuda(monkeypatch):
    """A CudaDevice over stand-ins that record what is called, in order."""
    calls = []

    def recorder(name, result=None):
        def record(*args, **kwargs):
            calls.append(name)
            return result

        return record

    @contextmanager
    def within(name):
        calls.append(f"{name} {{")
        yield
        calls.append("}")

    event = MagicMock(elapsed_time=lambda other: 250.0, record=recorder("record"), synchronize=recorder("wait"))
    stream = MagicMock(wait_stream=recorder("wait_stream"))
    properties = SimpleNamespace(name="NVIDIA Example", total_memory=80e9, major=9, minor=0, multi_processor_count=132)
    for name, value in {
        "get_device_properties": lambda index: properties,
        "synchronize": recorder("synchronize"),
        "empty_cache": recorder("empty_cache"),
        "reset_peak_memory_stats": recorder("reset"),
        "memory_allocated": recorder("allocated", 100),
        "memory_reserved": recorder("reserved", 1000),
        "max_memory_allocated": recorder("max_allocated", 160),
        "max_memory_reserved": recorder("max_reserved", 1500),
        "Event": lambda enable_timing: event,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda s: within("stream"),
        "CUDAGraph": lambda: MagicMock(replay=recorder("replay")),
        "graph": lambda g, stream: within("graph"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda value: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    device = gpu_device.CudaDevice()
    device.calls, device.recorder = calls, recorder
    return device


def test_capture_follows_the_recipe(cuda):
    """Warm-up on a side stream, gradients None at the capture, and the capture on that stream."""
    replay = cuda.capture(cuda.recorder("step"), cuda.recorder("zero_grad"), warm_up=2)
    warm_up = ["wait_stream", "stream {", "step", "step", "}", "wait_stream", "synchronize", "zero_grad"]
    assert cuda.calls == [*warm_up, "graph {", "step", "}"]
    replay()
    assert cuda.calls[-1] == "replay"


def test_device_time_is_between_two_events(cuda):
    assert cuda.seconds(cuda.recorder("step")) == 0.25
    assert cuda.calls == ["synchronize", "record", "step", "record", "wait"]


def test_flush_outlasts_the_host(cuda, monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: SimpleNamespace(sum=cuda.recorder("flush")))
    cuda.seconds_after_flush(cuda.recorder("op"), host_seconds=0.3)
    assert cuda.calls.count("flush") == 2 + 1 + 2  # to warm up, to time it (0.25 s), and for at least twice 0.3 s
    assert cuda.calls[-5:] == ["flush", "record", "op", "record", "wait"]


def test_peak_is_over_the_level_at_the_start(cuda):
    assert cuda.peak(cuda.recorder("step")) == (60, 500)
    order = [cuda.calls.index(name) for name in ("empty_cache", "reset", "allocated", "step", "max_allocated")]
    assert order == sorted(order)


def test_kernels_are_counted_without_copies_and_annotations(cuda, monkeypatch):
    def event(name, start, nanoseconds, device=torch.autograd.DeviceType.CUDA, annotation=False):
        values = {"name": name, "start_ns": start, "duration_ns": nanoseconds, "device_type": device}
        values["is_user_annotation"] = annotation
        return SimpleNamespace(**{key: (lambda value=value: value) for key, value in values.items()})

    events = [
        event("bottleneck", 100, 4000),
        event("bottleneck", 5000, 2100),  # started early: waits for conv
        event("conv", 4100, 1000),
        event("Memset (Device)", 7000, 500),
        event("Optimizer.step#SGD.step", 0, 9000, annotation=True),
        event("aten::relu", 0, 9000, torch.autograd.DeviceType.CPU),
    ]
    recorded = MagicMock()
    recorded.profiler.kineto_results.events.return_value = events

    @contextmanager
    def profile(activities):
        yield recorded

    monkeypatch.setattr(gpu_device, "profile", profile)
    found = cuda.kernels(cuda.recorder("step"))
    assert (found["launches"], found["busy_seconds"]) == (3, pytest.approx(7e-6))
    assert found["longest_kernels"][0] == {"name": "bottleneck", "launches": 2, "us": 6.0}


def test_device_is_described(cuda, device):
    described = cuda.describe()
    assert (described["name"], described["capability"]) == ("NVIDIA Example", "9.0")
    assert all(isinstance(value, str) for value in described.values())
    assert described.keys() == device.describe().keys()


def test_device_is_lost_where_it_cannot_be_waited_for(cuda, monkeypatch):
    assert not cuda.lost()

    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert cuda.lost()


def test_real_events_have_what_is_asked_of_them():
    """The profiler's events of this torch, of which the stand-ins above are copies."""
    from torch._C._autograd import _KinetoEvent

    assert all(hasattr(_KinetoEvent, name) for name in ("name", "duration_ns", "device_type", "is_user_annotation"))
    names = ("graph", "CUDAGraph", "Stream", "Event", "max_memory_reserved", "reset_peak_memory_stats", "empty_cache")
    assert all(hasattr(torch.cuda, name) for name in names)
