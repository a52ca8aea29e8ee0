"""The device that a GPU benchmark runs on: a CUDA device, or one simulated on the CPU to rehearse the benchmark.

Everything that differs between the two is in these two classes, so that a rehearsal proves all the rest.
"""

import contextlib
import gc
import shutil
import subprocess
import time
from collections import Counter, defaultdict
from functools import cached_property

import torch
from torch.profiler import ProfilerActivity, profile

from bench.tables import first_line

NOT_KERNELS = ("Memcpy", "Memset", "Context Sync", "Event Sync", "Stream Sync", "Stream Wait")


def open_device(simulated):
    return SimulatedDevice() if simulated else CudaDevice()


class CudaDevice:
    name, tiny, compiler, activity = "cuda", False, "inductor", ProfilerActivity.CUDA
    # matrix products and copies that measure the ceilings; the flush between runs is several times the L2 cache
    product_size = 8192
    copy_bytes = 2 << 30
    flush_bytes = 1 << 30

    def __init__(self):
        # The plain networks are fastest with products of float32 in TF32, and with cuDNN's search for algorithms.
        # cuDNN's own convolutions may use TF32 as torch is installed.
        torch.set_float32_matmul_precision("high")
        self.search_algorithms(True)
        self.properties = torch.cuda.get_device_properties(0)
        total = self.properties.total_memory
        self.copy_bytes = min(self.copy_bytes, total // 8 // 4 * 4)
        self.flush_bytes = min(self.flush_bytes, total // 16)

    def search_algorithms(self, on):
        torch.backends.cudnn.benchmark = on

    def describe(self):
        """Facts that environment.describe leaves out, and the settings that the figures depend on."""
        p, smi, driver = self.properties, shutil.which("nvidia-smi"), ""
        if smi:
            query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True).stdout.strip().split("\n")[0]
        return {
            "name": p.name,
            "driver": driver or "unknown",
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": str(p.multi_processor_count),
            "l2_mb": f"{getattr(p, 'L2_cache_size', 0) / 1e6:.0f}",
            "cudnn_benchmark": str(torch.backends.cudnn.benchmark),
            "tf32": f"convolutions {torch.backends.cudnn.conv.fp32_precision}, "
            f"products {torch.backends.cuda.matmul.fp32_precision}",
        }

    def synchronize(self):
        torch.cuda.synchronize()

    def lost(self):
        """True if an error has made the device useless to this process, as an illegal access does."""
        try:
            self.synchronize()
        except RuntimeError:
            return True
        return False

    @contextlib.contextmanager
    def errors_to(self, write):
        """Give the first line of an error to `write` and go on, unless the device is lost: another process takes over."""
        try:
            yield
        except (RuntimeError, TypeError, ValueError) as error:
            write(first_line(error))
            if self.lost():
                raise

    def seconds(self, function):
        """Device time of one call, from an idle device: what the host takes to queue it counts where the device waits."""
        self.synchronize()
        return self._between_events(function)

    def seconds_after_flush(self, function, host_seconds):
        """Device time of one call with nothing of its data in the L2 cache, and without waiting for the host.

        First the device reads a large buffer, for at least as long as the host takes to queue the call. Reads, because
        what a flush had written would still be on its way to memory while the call is timed.
        """
        flush, flush_seconds = self._flush
        torch.cuda.synchronize()
        for _ in range(1 + int(2 * host_seconds / flush_seconds)):
            flush()
        return self._between_events(function)

    @cached_property
    def _flush(self):
        """The function that reads a large buffer, and how long it takes."""
        flush = torch.zeros(self.flush_bytes // 4, device="cuda").sum
        flush()
        return flush, self.seconds(flush)

    def _between_events(self, function):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak(self, function):
        """Bytes allocated and bytes reserved at the highest point of one call, over those at its start."""
        self.free()
        torch.cuda.reset_peak_memory_stats()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - allocated, torch.cuda.max_memory_reserved() - reserved

    def reserved(self):
        self.free()
        return torch.cuda.memory_reserved()

    def free(self):
        """Gives the memory that no tensor holds back to the device."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def capture(self, function, prepare, warm_up=3):
        """A CUDA graph of `function`, whose replay is returned; `prepare` is called before it is captured.

        PyTorch's recipe for a whole training step: some calls on a side stream, gradients set to None, so that backward
        allocates them from the graph's own memory, then the capture, here on the same side stream.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_up):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        prepare()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            function()
        graph.captured = function  # whose tensors the graph reads and writes: they must live as long
        return graph.replay

    def compile(self, model):
        return torch.compile(model, dynamic=False, backend=self.compiler)

    def kernels(self, function):
        """Launches in one call, seconds that they ran in all, and the kernels that took longest."""
        with profile(activities=[self.activity]) as recorded:
            function()
            self.synchronize()
        events = [e for e in recorded.profiler.kineto_results.events() if self.is_kernel(e)]
        return summarize_kernels([(e.name(), e.start_ns(), e.start_ns() + e.duration_ns()) for e in events])

    def is_kernel(self, event):
        on_device = event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation()
        return on_device and not event.name().startswith(NOT_KERNELS)


class SimulatedDevice(CudaDevice):
    """The CPU in a GPU's place: what is measured means nothing, but every line that measures is run."""

    name, tiny, compiler, activity = "cpu", True, "aot_eager", ProfilerActivity.CPU
    product_size = 64
    copy_bytes = flush_bytes = 1 << 16

    def __init__(self):
        torch.set_num_threads(1)  # sizes are tiny, and others may be at work

    def search_algorithms(self, on):
        pass

    def describe(self):
        names = ("driver", "capability", "multiprocessors", "l2_mb", "cudnn_benchmark", "tf32")
        return {"name": "simulated"} | dict.fromkeys(names, "simulated")

    def synchronize(self):
        pass

    def seconds_after_flush(self, function, host_seconds):
        return self._between_events(function)

    def _between_events(self, function):
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def peak(self, function):
        from bench.memory_meter import allocated_levels  # needs the library, which may not load where there is a GPU

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            function()
        levels = allocated_levels(recorded.profiler.kineto_results.events())
        peak = max((level for _, level in levels), default=0)
        return peak, peak

    def reserved(self):
        return 0

    def free(self):
        gc.collect()

    def capture(self, function, prepare, warm_up=3):
        for _ in range(warm_up):
            function()
        prepare()
        function()
        return function

    def is_kernel(self, event):
        return event.name().startswith("densenet_ext::")


def summarize_kernels(events, longest=40):
    """A dict of how many kernels ran, for how long in all, and which took longest, from (name, start, end) in nanoseconds.

    A kernel that starts before the one in front of it has ended only waits for it until then.
    """
    counts, time_of, ended = Counter(name for name, _, _ in events), defaultdict(int), 0
    for name, start, end in sorted(events, key=lambda event: event[1]):
        time_of[name] += max(0, end - max(start, ended))
        ended = max(ended, end)
    top = sorted(time_of, key=time_of.get, reverse=True)[:longest]
    return {
        "launches": len(events),
        "busy_seconds": sum(time_of.values()) / 1e9,
        "longest_kernels": [{"name": n[:160], "launches": counts[n], "us": round(time_of[n] / 1e3, 1)} for n in top],
    }
