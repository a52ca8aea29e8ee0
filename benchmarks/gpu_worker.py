"""The processes of gpu.py that use the GPU: what one does, and how it is watched over.

A kernel that reads where it must not costs its process the device, one that waits for ever never returns. So each part
is a process that keeps a journal, and one that dies or stands still is followed by another that leaves out its cell.
"""

import sys
import time
from pathlib import Path

from gpu_checks import Process
from journal import Findings, Journal

RESTARTS = 4
LATE = 15  # seconds after its deadline, for its last cell; one that only compiles may be ended at any time
STARTING = 60  # seconds until the first line of a journal, beside those that a cell may take


def work(args):
    """What a worker does: one part, into its journal in `folder`."""
    import gpu_device
    import gpu_kernels
    import gpu_steps

    deadline = time.monotonic() + args.seconds
    journal, tiny = Journal(args.folder / f"{args.worker}.jsonl"), bool(args.simulate)
    device = gpu_device.open_device(args.simulate)
    variant = "" if args.variant == "BC" else args.variant
    names = args.groups.split(",") if args.groups else None
    implementations = args.implementations.split(",") if args.implementations else None
    journal.fact("device", device.describe())
    if args.worker == "kernels":
        gpu_kernels.measure(device, journal, deadline, tiny)
    elif args.worker == "compile":
        gpu_steps.compile_beforehand(device, journal, deadline, tiny, variant, names)
    elif args.worker == "profile":
        gpu_steps.count_kernels(device, journal, deadline, tiny, variant, names, implementations)
    else:
        journal.fact("architectures", {n: vars(a) for n, a in gpu_steps.architectures(device, variant, tiny).items()})
        compiled = args.folder / "compile.jsonl"
        compiled = Findings(compiled).rows if compiled.exists() else None
        gpu_steps.measure(device, journal, deadline, tiny, variant, names, implementations, compiled)


class Worker:
    """A part in a process; one that dies or stands still is started again and leaves out what it was at."""

    late = LATE

    def __init__(self, part, args, folder, seconds, environment):
        self.part, self.args, self.folder, self.environment = part, args, folder, environment
        self.journal = folder / f"{part}.jsonl"
        self.deadline, self.starts, self.process = time.monotonic() + seconds, 0, None
        self.size, self.changed, self.allow, self.begun = -1, 0.0, 60, 0
        self.start()

    def start(self):
        self.starts += 1
        seconds = self.deadline - time.monotonic()
        log = self.folder / f"{self.part}.{self.starts}.log"
        self.process = Process(
            self.command(seconds), log, seconds + self.late * (self.part != "compile"), self.environment
        )
        self.changed = time.monotonic()

    def command(self, seconds):
        command = [sys.executable, Path(__file__).with_name("gpu.py"), "--worker", self.part, "--folder", self.folder]
        command += ["--seconds", f"{seconds:.0f}", "--variant", self.args.variant]
        for name in ("simulate", "groups", "implementations"):
            if getattr(self.args, name):
                command += [f"--{name}", getattr(self.args, name)]
        return command

    def poll(self):
        """Whether there is nothing left to wait for."""
        if self.process.poll():
            if self.process.process.returncode == 0:
                return True
            return not self.take_over("stopped")
        if self.grown():
            self.changed, self.allow = time.monotonic(), Findings(self.journal).allow
        elif time.monotonic() > self.changed + self.allow + STARTING * (self.size <= 0):
            self.process.kill()
            return not self.take_over(f"stood still for {self.allow} s")
        return False

    def kill(self):
        self.process.kill()

    def grown(self):
        size = self.journal.stat().st_size if self.journal.exists() else 0
        grown, self.size = size != self.size, size
        return grown

    def take_over(self, what):
        """Notes what happened; whether another process goes on."""
        said, journal = self.process.tail(1), Journal(self.journal)
        cell = journal.died(f"the process {what}")
        journal.note(f"{self.part}: a process {what} in '{cell}': {said[0][:300] if said else 'no output'}")
        begun, self.begun = self.begun, len(journal.begun)
        if self.begun == begun:  # it died before it measured anything, as the next one would
            return False
        if self.starts > RESTARTS or time.monotonic() > self.deadline - 15:
            return False
        self.start()
        return True
