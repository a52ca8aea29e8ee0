"""Training steps on a GPU: forward, loss, backward and SGD, of every implementation, in several networks and types.

In each group (groups.py) gradients of the fused network are compared with the plain one's first; every implementation runs
a step of full size to warm up and its memory is measured; at last all are timed in turn. A row is written as soon as there
is something in it. Kernels are counted by another process at the end: where a profiler has run once, launches may stay
slower.
"""

import math
import time

import torch

from bench.gpu.gradients import check_gradients
from bench.implementations import IMPLEMENTATIONS
from bench.steps import GpuStep, Sample
from bench.tables import first_line
from bench.timing import interleave, quantile_row

# An implementation is not begun later than this many seconds before its group's end; timing takes at most so long.
RESERVE, TIMING = 6, 12
COMPILING = 100  # seconds that a compiled step needs where none was compiled beforehand
LONGEST_SAMPLE = 0.03  # seconds: short steps are timed several at a time


def measure(request, journal, deadline, compiled=None):
    """Measure all groups, each with its share of the time until `deadline`; what one leaves over goes to the next.

    compiled: what compile_beforehand found, by key; None where it was not run.
    """
    groups, started, share = request.groups(), time.monotonic(), 0.0
    journal.fact("cells", sum(2 + len(g.implementations) for g in groups))
    for group in groups:
        share += group.share
        GroupRun(request, journal, group, started + (deadline - started) * share, compiled).run()
        request.device.free()


class GroupRun:
    def __init__(self, request, journal, group, end, compiled=None):
        self.request, self.device, self.journal, self.group, self.end = request, request.device, journal, group, end
        self.compiled = compiled
        self.rounds = 2 if request.tiny else 15
        self.broken = None  # the error after which this process is to be left to another

    def spec(self, implementation):
        return self.request.spec(self.group, implementation)

    def row(self, which, **values):
        self.journal.row(f"{self.group.key} {which}", **values)

    def fail(self, implementation, error):
        self.row(implementation, **self.cell(implementation), error=error)

    def run(self):
        wrong = self.check()
        ready = {}
        for implementation in self.group.implementations:
            if implementation.startswith("fused") and wrong:
                self.fail(implementation, "gradients disagree: not timed")
                continue
            if time.monotonic() > self.end - RESERVE:
                self.journal.note(f"steps: out of time before {self.group.key} {implementation}")
                break
            if self.broken is not None:
                break
            if self.compiles_too_long(implementation):
                continue
            if self.journal.begin(f"{self.group.key} {implementation}", allow=120, **self.cell(implementation)):
                timed = self.prepare(implementation)
                if timed is not None:
                    ready[implementation] = timed
        if ready and self.journal.begin(f"{self.group.key} timing", allow=60):
            self.time(ready)
            self.row("timing")
        if self.broken is not None:
            raise self.broken

    def cell(self, implementation):
        s = self.spec(implementation)
        return {
            "net": self.group.net,
            "variant": s.variant or "DenseNet-BC",
            "dtype": s.dtype,
            "batch_size": self.group.batch_size,
            "size": s.size,
            "implementation": implementation,
        }

    def compiles_too_long(self, implementation):
        """True if a compiled step cannot be had in the time left, because none was compiled beforehand."""
        if IMPLEMENTATIONS[implementation].runner != "compile" or self.compiled is None:
            return False
        found = self.compiled.get(f"compile {self.group.key}", {})
        if "seconds" in found or ("error" not in found and time.monotonic() < self.end - COMPILING):
            return False
        self.fail(implementation, found.get("error", "not compiled in time"))
        return True

    def check(self):
        """True if the fused network's gradients are wrong; its time is not worth knowing then."""
        key = f"{self.group.key} agreement"
        if not any(i.startswith("fused") for i in self.group.implementations):
            return False
        if not self.journal.begin(key):  # a process that died was here: where it died, or what it found
            return not self.journal.previous.rows.get(key, {}).get("agrees", False)
        self.device.search_algorithms(False)  # for sizes that are never run again
        try:
            found = check_gradients(self.spec)
        except (RuntimeError, ValueError) as error:
            found = {"agrees": False, "error": first_line(error)}
            if self.device.lost():
                self.journal.row(key, **found)
                raise
        finally:
            self.device.search_algorithms(True)
            self.device.free()
        self.journal.row(key, **found)
        return not found["agrees"]

    def prepare(self, implementation):
        """Warm up and measure what needs no quiet machine; returns what is to be timed, or None where that failed."""
        started, tiny = time.monotonic(), self.request.tiny
        try:
            step = GpuStep(self.spec(implementation), self.device)
            warm_up = time.monotonic() - started
            function, memory = step.run()
            quick = min(self.device.seconds(function) for _ in range(1 if tiny else 3))
        except torch.OutOfMemoryError:
            self.fail(implementation, "out of memory")
            self.device.free()
            return None
        except Exception as error:  # an implementation that fails is a result; compilers raise anything
            self.fail(implementation, first_line(error))
            if self.device.lost():
                raise
            if IMPLEMENTATIONS[implementation].runner == "graph":
                self.broken = error  # torch's generator may think for ever that it is being captured
            self.device.free()
            return None
        found = {"warm_up_seconds": warm_up, "first_loss": step.first_loss, "seconds": quick, "rounds": 0}
        self.row(implementation, **self.cell(implementation), **found, **memory)
        return Sample(function, 1 if tiny else max(1, min(10, math.ceil(LONGEST_SAMPLE / quick))))

    def time(self, ready):
        """Time interleaved samples of everything that is ready; what fails is left out and the others begin again."""
        deadline = min(time.monotonic() + TIMING, self.end)
        while ready:
            samples = dict(ready)
            try:
                for sample in samples.values():
                    sample()  # takes back the memory that measuring another one's gave away
                times = interleave(samples, self.rounds, deadline, seconds=self.device.seconds)
            except torch.OutOfMemoryError as error:
                failed = next((i for i, sample in samples.items() if sample.running), None)
                if failed is None:
                    raise
                self.row(failed, error=f"out of memory beside the others: {first_line(error)}")
                del ready[failed], samples
                self.device.free()
                continue
            except RuntimeError as error:
                self.journal.note(f"steps: {self.group.key} could not be timed: {first_line(error)}")
                if self.device.lost():
                    raise
                return
            for implementation, found in times.items():
                count = ready[implementation].count
                row = quantile_row([t / count for t in found]) | {"rounds": len(found)}
                self.row(implementation, **row, steps_a_round=count)
            return


def count_kernels(request, journal, deadline):
    """Count launches in a step of every implementation, and the kernels that take longest in it.

    cuDNN does not search for algorithms here: that takes longer than all the rest.
    """
    device = request.device
    device.search_algorithms(False)
    for group in request.groups():
        for implementation in group.implementations:
            key = f"{group.key} {implementation}"
            if IMPLEMENTATIONS[implementation].runner == "compile":
                continue
            if time.monotonic() > deadline:
                journal.note(f"profile: out of time before {key}")
                return
            if not journal.begin(key):
                continue
            try:
                step = GpuStep(request.spec(group, implementation), device)
                function, _ = step.run()
                found = device.kernels(function)
            except RuntimeError as error:
                journal.row(key, profile_error=first_line(error))
                if device.lost():
                    raise
            else:
                journal.row(key, **found)
            step = function = None
            device.free()


def compile_beforehand(request, journal, deadline):
    """Run one compiled step of every group, so that the compiler's results are on disk when steps are measured."""
    for group in request.groups():
        compiled = [name for name in group.implementations if IMPLEMENTATIONS[name].runner == "compile"]
        if not compiled or time.monotonic() > deadline:
            continue
        key = f"compile {group.key}"
        if not journal.begin(key, allow=240):
            continue
        started = time.monotonic()
        try:
            GpuStep(request.spec(group, compiled[0]), request.device)
        except Exception as error:  # the compiler may raise anything; it is met again where steps are measured
            journal.row(key, error=first_line(error))
            continue
        journal.row(key, seconds=time.monotonic() - started)
        torch.compiler.reset()
        request.device.free()
