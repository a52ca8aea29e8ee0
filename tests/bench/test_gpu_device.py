"""The lines of bench/gpu/device.py that only a GPU runs, over stand-ins that record what is called."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from bench.gpu import device as gpu_device


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda, which records what is called, in order; `names` gives the names of the calls."""
    cuda = MagicMock()
    cuda.get_device_properties.return_value = SimpleNamespace(
        name="NVIDIA Example", total_memory=80e9, major=9, minor=0, multi_processor_count=132
    )
    cuda.memory_allocated.return_value, cuda.max_memory_allocated.return_value = 100, 160
    cuda.memory_reserved.return_value, cuda.max_memory_reserved.return_value = 1000, 1500
    cuda.Event().elapsed_time.return_value = 250.0
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda value: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    cuda.device = gpu_device.CudaDevice()
    cuda.reset_mock()
    return cuda


def names(cuda):
    return [name for name, *_ in cuda.mock_calls]


def test_capture_follows_the_recipe(cuda):
    """Warm-up on a side stream, gradients None at the capture, and the capture on that stream."""
    replay = cuda.device.capture(cuda.step, cuda.zero_grad, warm_up=2)
    warm_up = ["Stream", "current_stream", "Stream().wait_stream", "stream", "stream().__enter__", "step", "step"]
    warm_up += ["stream().__exit__", "current_stream", "current_stream().wait_stream", "synchronize", "zero_grad"]
    assert names(cuda) == [*warm_up, "CUDAGraph", "graph", "graph().__enter__", "step", "graph().__exit__"]
    cuda.graph.assert_called_with(cuda.CUDAGraph(), stream=cuda.Stream())
    cuda.stream.assert_called_with(cuda.Stream())
    replay()
    assert names(cuda)[-1] == "CUDAGraph().replay"


TIMED = ["Event().record", "step", "Event().record", "Event().synchronize", "Event().elapsed_time"]


def test_device_time_is_between_two_events(cuda):
    assert cuda.device.seconds(cuda.step) == 0.25
    assert names(cuda) == ["synchronize", "Event", "Event", *TIMED]


def test_flush_outlasts_the_host(cuda, monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: SimpleNamespace(sum=cuda.flush))
    cuda.device.seconds_after_flush(cuda.step, host_seconds=0.3)
    assert cuda.flush.call_count == 2 + 1 + 2  # to warm up, to time it (0.25 s), and for at least twice 0.3 s
    assert names(cuda)[-8:] == ["flush", "Event", "Event", *TIMED]


def test_peak_is_over_the_level_at_the_start(cuda):
    assert cuda.device.peak(cuda.step) == (60, 500)
    order = ("empty_cache", "reset_peak_memory_stats", "memory_allocated", "step", "max_memory_allocated")
    order = [names(cuda).index(name) for name in order]
    assert order == sorted(order)


def test_kernels_are_counted_without_copies_and_annotations(cuda, monkeypatch):
    def event(name, start, nanoseconds, device=torch.autograd.DeviceType.CUDA, annotation=False):
        values = {"name": name, "start_ns": start, "duration_ns": nanoseconds, "device_type": device}
        values["is_user_annotation"] = annotation
        return SimpleNamespace(**{key: (lambda value=value: value) for key, value in values.items()})

    profile = MagicMock()
    profile.return_value.__enter__.return_value.profiler.kineto_results.events.return_value = [
        event("bottleneck", 100, 4000),
        event("bottleneck", 5000, 2100),  # started early: waits for conv
        event("conv", 4100, 1000),
        event("Memset (Device)", 7000, 500),
        event("Optimizer.step#SGD.step", 0, 9000, annotation=True),
        event("aten::relu", 0, 9000, torch.autograd.DeviceType.CPU),
    ]
    monkeypatch.setattr(gpu_device, "profile", profile)
    found = cuda.device.kernels(cuda.step)
    assert (found["launches"], found["busy_seconds"]) == (3, pytest.approx(7e-6))
    assert found["longest_kernels"][0] == {"name": "bottleneck", "launches": 2, "us": 6.0}


def test_device_is_described(cuda, device):
    described = cuda.device.describe()
    assert (described["name"], described["capability"]) == ("NVIDIA Example", "9.0")
    assert all(isinstance(value, str) for value in described.values())
    assert described.keys() == device.describe().keys()


def test_device_is_lost_where_it_cannot_be_waited_for(cuda):
    assert not cuda.device.lost()
    cuda.synchronize.side_effect = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert cuda.device.lost()


def test_real_events_have_what_is_asked_of_them():
    """The profiler's events of this torch, of which the stand-ins above are copies."""
    from torch._C._autograd import _KinetoEvent

    assert all(hasattr(_KinetoEvent, name) for name in ("name", "duration_ns", "device_type", "is_user_annotation"))
    names = ("graph", "CUDAGraph", "Stream", "Event", "max_memory_reserved", "reset_peak_memory_stats", "empty_cache")
    assert all(hasattr(torch.cuda, name) for name in names)
