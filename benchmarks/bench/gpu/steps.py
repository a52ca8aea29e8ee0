"""Training steps on a GPU: forward, loss, backward and SGD, of every implementation, in several networks and types.

In each group (groups.py) gradients of the fused network are compared with the plain one's first; every implementation runs
a step of full size to warm up and its memory is measured; at last all are timed in turn. A row is written as soon as there
is something in it. Kernels are counted by another process at the end: where a profiler has run once, launches may stay
slower.
"""

import math
import time
from functools import partial

import torch

from bench.agreement import check_on_gpu
from bench.gpu.groups import choose_groups
from bench.implementations import IMPLEMENTATIONS
from bench.memory_meter import measure_memory
from bench.roofline import step_bytes
from bench.steps import TrainingStep
from bench.tables import first_line
from bench.timing import interleave, quantile_row

# An implementation is not begun later than this many seconds before its group's end; timing takes at most so long.
RESERVE, TIMING = 6, 12
COMPILING = 100  # seconds that a compiled step needs where none was compiled beforehand
LONGEST_SAMPLE = 0.03  # seconds: short steps are timed several at a time


class GpuStep(TrainingStep):
    """One training step on `device`, not waited for. The first, at full size, is its warm-up."""

    def __init__(self, spec, device):
        self.device = device
        super().__init__(spec)

    def warm_up(self):
        if self.spec.traits.runner == "compile":
            self.model = self.device.compile(self.model)
        torch.manual_seed(2)  # equal masks in every implementation whose random numbers are torch's
        self.optimizer.zero_grad()
        loss = self.forward()
        self.first_loss = loss.item()
        self.finish(loss)
        self.device.synchronize()

    def __call__(self):
        self.optimizer.zero_grad()  # gradients become None, PyTorch's default: backward need not add to them
        self.finish(self.forward())

    def run(self):
        """The function to be timed, with the memory that it takes: peak and kept bytes over parameters, gradients and
        momentum, and what the allocator reserved for it."""
        if self.spec.traits.runner == "graph":
            graph = []
            capture = partial(self.device.capture, self, self.optimizer.zero_grad)
            peak, reserved = self.device.peak(lambda: graph.append(capture()))
            return graph[0], {"peak_bytes": peak, "kept_bytes": None, "reserved_bytes": reserved}
        start = self.device.reserved()
        memory = measure_memory(self)
        reserved = None if memory.reserved_bytes is None else memory.reserved_bytes - start
        return self, {"peak_bytes": memory.peak_bytes, "kept_bytes": memory.kept_bytes, "reserved_bytes": reserved}


def measure(device, groups, journal, deadline, compiled=None):
    """Measure all groups, each with its share of the time until `deadline`; what one leaves over goes to the next.

    compiled: what compile_beforehand found, by key; None where it was not run.
    """
    started, share = time.monotonic(), 0.0
    journal.fact("bytes of DenseNet-121", step_bytes(choose_groups(device.name, tiny=device.tiny)[0].spec_of("fused")))
    journal.fact("cells", sum(2 + len(g.implementations) for g in groups))
    for group in groups:
        share += group.share
        GroupRun(device, journal, group, started + (deadline - started) * share, compiled).run()
        device.free()


class GroupRun:
    def __init__(self, device, journal, group, end, compiled=None):
        self.device, self.journal, self.group, self.end, self.compiled = device, journal, group, end, compiled
        self.broken = None  # the error after which this process is to be left to another
        self.running = None  # the implementation that is being timed

    def row(self, which, **values):
        self.journal.row(f"{self.group.key} {which}", **values)

    def run(self):
        wrong = self.check()
        ready = {}
        for implementation in self.group.implementations:
            cell = self.cell(implementation)
            error = self.reason_against(implementation, wrong)
            if error:
                self.row(implementation, **cell, error=error)
                continue
            if time.monotonic() > self.end - RESERVE:
                self.journal.note(f"steps: out of time before {self.group.key} {implementation}")
                break
            if self.journal.begin(f"{self.group.key} {implementation}", allow=120, **cell):
                timed = self.prepare(implementation, cell)
                if timed is not None:
                    ready[implementation] = timed
            if self.broken is not None:
                break
        if ready and self.journal.begin(f"{self.group.key} timing", allow=60):
            self.time(ready)
            self.row("timing")
        if self.broken is not None:
            raise self.broken

    def cell(self, implementation):
        g, s = self.group, self.group.spec
        cell = {"net": g.net, "variant": s.variant or "DenseNet-BC", "dtype": s.dtype, "batch_size": g.batch_size}
        return cell | {"size": s.size, "implementation": implementation}

    def reason_against(self, implementation, wrong):
        """The reason not to begin an implementation at all, or None."""
        if implementation.startswith("fused") and wrong:
            return "gradients disagree: not timed"
        if IMPLEMENTATIONS[implementation].runner != "compile" or self.compiled is None:
            return None
        found = self.compiled.get(f"compile {self.group.key}", {})
        if "seconds" in found or ("error" not in found and time.monotonic() < self.end - COMPILING):
            return None
        return found.get("error", "not compiled in time")

    def check(self):
        """True if the fused network's gradients are wrong; its time is not worth knowing then."""
        key, found = f"{self.group.key} agreement", {"agrees": False}
        if not any(i.startswith("fused") for i in self.group.implementations):
            return False
        if not self.journal.begin(key):  # a process that died was here: where it died, or what it found
            return not self.journal.previous.rows.get(key, {}).get("agrees", False)
        self.device.search_algorithms(False)  # for sizes that are never run again
        try:
            with self.device.errors_to(lambda error: self.journal.row(key, agrees=False, error=error)):
                found = check_on_gpu(self.group.spec_of)
                self.journal.row(key, **found)
        finally:
            self.device.search_algorithms(True)
            self.device.free()
        return not found["agrees"]

    def prepare(self, implementation, cell):
        """Warm up and measure what needs no quiet machine; returns what is to be timed, and how often in a sample."""
        started = time.monotonic()
        try:
            step = GpuStep(self.group.spec_of(implementation), self.device)
            warm_up = time.monotonic() - started
            function, memory = step.run()
            quick = min(self.device.seconds(function) for _ in range(1 if self.device.tiny else 3))
        except Exception as error:  # an implementation that fails is a result; compilers raise anything
            no_memory = isinstance(error, torch.OutOfMemoryError)
            self.row(implementation, **cell, error="out of memory" if no_memory else first_line(error))
            if not no_memory and self.device.lost():
                raise
            if not no_memory and IMPLEMENTATIONS[implementation].runner == "graph":
                self.broken = error  # torch's generator may think for ever that it is being captured
            self.device.free()
            return None
        found = {"warm_up_seconds": warm_up, "first_loss": step.first_loss, "seconds": quick, "rounds": 0}
        self.row(implementation, **cell, **found, **memory)
        return function, 1 if self.device.tiny else max(1, min(10, math.ceil(LONGEST_SAMPLE / quick)))

    def run_sample(self, implementation, function, count):
        self.running = implementation
        for _ in range(count):
            function()
        self.running = None

    def time(self, ready):
        """Time interleaved samples of everything that is ready; what fails is left out and the others begin again."""
        deadline = min(time.monotonic() + TIMING, self.end)
        while ready:
            samples = {name: partial(self.run_sample, name, *timed) for name, timed in ready.items()}
            try:
                for sample in samples.values():
                    sample()  # takes back the memory that measuring another one's gave away
                timed = {name: partial(self.device.seconds, sample) for name, sample in samples.items()}
                times = interleave(timed, 2 if self.device.tiny else 15, deadline)
            except torch.OutOfMemoryError as error:
                if self.running is None:
                    raise
                self.row(self.running, error=f"out of memory beside the others: {first_line(error)}")
                del ready[self.running], samples
                self.device.free()
                continue
            except RuntimeError as error:
                self.journal.note(f"steps: {self.group.key} could not be timed: {first_line(error)}")
                if self.device.lost():
                    raise
                return
            for implementation, found in times.items():
                count = ready[implementation][1]
                row = quantile_row([t / count for t in found]) | {"rounds": len(found)}
                self.row(implementation, **row, steps_a_round=count)
            return


def count_kernels(device, groups, journal, deadline):
    """Count launches in a step of every implementation, and the kernels that take longest in it.

    cuDNN does not search for algorithms here: that takes longer than all the rest.
    """
    device.search_algorithms(False)
    cells = [(g, i) for g in groups for i in g.implementations if IMPLEMENTATIONS[i].runner != "compile"]
    for group, implementation in cells:
        key = f"{group.key} {implementation}"
        if time.monotonic() > deadline:
            journal.note(f"profile: out of time before {key}")
            return
        if not journal.begin(key):
            continue
        with device.errors_to(lambda error, key=key: journal.row(key, profile_error=error)):
            function, _ = GpuStep(group.spec_of(implementation), device).run()
            journal.row(key, **device.kernels(function))
        function = None
        device.free()


def compile_beforehand(device, groups, journal, deadline):
    """Run one compiled step of every group, so that the compiler's results are on disk when steps are measured."""
    for group in groups:
        compiled = [name for name in group.implementations if IMPLEMENTATIONS[name].runner == "compile"]
        key = f"compile {group.key}"
        if not compiled or time.monotonic() > deadline or not journal.begin(key, allow=240):
            continue
        started = time.monotonic()
        try:
            GpuStep(group.spec_of(compiled[0]), device)
        except Exception as error:  # the compiler may raise anything; it is met again where steps are measured
            journal.row(key, error=first_line(error))
            continue
        journal.row(key, seconds=time.monotonic() - started)
        torch.compiler.reset()
        device.free()
