"""A run of gpu.py: its parts one after another, each with a deadline, and the results so far.

Nothing here is imported with the library: the first part may have to build it.
"""

import os
import sys
import time

from bench import ROOT, results
from bench.gpu import checks, report, targets
from bench.implementations import IMPLEMENTATIONS
from bench.runner.journal import Findings
from bench.runner.process import Process
from bench.runner.worker import Worker, follow

PARTS = ("build", "tests", "sanitizer", "compile", "kernels", "steps", "profile")
ORDER = {"build": 0, "tests": 1, "sanitizer": 1, "compile": 1, "kernels": 2, "steps": 3, "profile": 4}
TIME_LIMIT = 460
# Time limit of each part in seconds; a part without one may use all that is left. RESERVED is left to the measurements.
LIMITS = {"build": 240, "tests": 150, "sanitizer": 120, "kernels": 50, "profile": 60}
RESERVED = {"kernels": 50, "steps": 130, "profile": 30}
COMPILING = 150  # seconds at least for compiling, where anything is to come of it
LATE = 15  # seconds after its deadline for a part's last cell; one that only compiles may be ended at any time


def slug(name):
    """NVIDIA H200 -> nvidia-h200"""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split()) or "gpu"


class Run:
    """The results so far, where they are written, and the time that is left."""

    def __init__(self, args, folder):
        self.args, self.folder, self.output = args, folder, args.output
        self.end = time.monotonic() + args.time_limit
        notes = ["A rehearsal on the CPU: no figure here means anything."] if args.simulate else []
        self.results = {"benchmark": "gpu", "machine": {}, "targets": [], "notes": notes}
        if self.output is None:
            import torch

            self.output = ROOT / "benchmarks" / "results" / slug(torch.cuda.get_device_name(0)) / "gpu.json"

    def lead(self):
        """All parts; the exit status."""
        try:
            if not self.build() or not self.describe():
                print("\n".join(["Nothing was measured.", *self.results["notes"]]), flush=True)
                return 1
            self.save()
            self.check()
            for part, read in (("kernels", read_kernels), ("steps", read_steps), ("profile", read_profile)):
                if self.wants(part):
                    self.measure(part, read)
                    self.say_ended(part)
        finally:
            self.save()
        print("\n\n".join(report.sections_of(self.results)[::-1]) + "\n")
        seconds = self.args.time_limit - self.remaining()
        print(f"Written: {self.output} and {self.output.with_suffix('.md').name}, after {seconds:.0f} s", flush=True)
        return 0

    def remaining(self):
        return self.end - time.monotonic()

    def wants(self, part):
        return part in self.args.parts and not (part == "build" and self.args.no_build)

    def limit(self, part):
        """Seconds that a part may take, so that later parts have what is reserved for them."""
        reserved = sum(s for p, s in RESERVED.items() if ORDER[p] > ORDER[part] and self.wants(p))
        scale = min(1.0, self.args.time_limit / TIME_LIMIT)
        return max(0.0, min(LIMITS.get(part, self.remaining()), self.remaining() - reserved * scale - 8))

    def note(self, text):
        self.results["notes"].append(text)

    def save(self):
        results.write_json(self.output, self.results)

    def say_ended(self, part):
        print(f"{part}: ended, {self.remaining():.0f} s are left", flush=True)

    def process(self, command, name, environment, part=None):
        return Process(command, self.folder / f"{name}.log", self.limit(part or name), environment)

    def worker(self, part):
        return Worker(part, self.folder, self.limit(part), {}, LATE * (part != "compile"))

    def build(self):
        """Build the library; False where nothing can be measured because of it."""
        if not self.wants("build"):
            return True
        if self.args.simulate:
            self.results["build"] = {"skipped": "simulated: skipped"}
            return True
        import torch

        print("build ...", flush=True)
        major, minor = torch.cuda.get_device_capability(0)
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        process = self.process(command, "build", {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}).wait()
        self.results["build"] = process.summary()
        if process.status != 0:
            self.results["build"]["output"] = process.tail()
            print("\n".join(process.tail(30)), flush=True)
        return process.status == 0

    def describe(self):
        """Describe device and library; False where the library does not load or has no kernels for the device."""
        from bench.gpu.device import open_device

        device = open_device(self.args.simulate)
        self.results["machine"] = device.describe()
        try:
            from bench import environment
            from densenet_ext import info
            from densenet_ext._ops import handles
        except ImportError as error:
            self.note(str(error))
            return False
        kernels = {"cuda_kernels": info.collect().get("CUDA kernels", "unknown")}
        self.results["machine"] = environment.describe(device.name) | device.describe() | kernels
        print(report.heading(self.results["machine"]) + "\n", flush=True)
        if device.name not in handles.DEVICES:
            self.note(f"the library has no kernels for {device.name}: was it built where nvcc is?")
        return device.name in handles.DEVICES

    def check(self):
        """Run tests, compute-sanitizer and the compiler side by side: nothing of it is timed, and all cores are used."""
        waiting = {}
        if self.wants("tests"):
            waiting["tests"] = self.start_tests()
        if self.wants("sanitizer"):
            waiting |= self.start_sanitizers()
        names = self.args.implementations or IMPLEMENTATIONS
        if self.wants("compile") and self.wants("steps") and any(IMPLEMENTATIONS[n].runner == "compile" for n in names):
            if self.args.simulate or self.limit("compile") >= COMPILING:
                waiting["compile"] = self.worker("compile"), self.read_compiled
            else:
                self.note("compile: not enough time for anything")
                (self.folder / "compile.jsonl").touch()  # nothing was compiled
        try:
            while waiting:
                for name in [name for name, (process, _) in waiting.items() if process.poll()]:
                    process, finish = waiting.pop(name)
                    finish(process)
                    self.save()
                    self.say_ended(name)
                time.sleep(0.2)
        finally:  # interrupted: nothing that was started is left behind
            for process, _ in waiting.values():
                process.kill()

    def start_tests(self):
        if self.args.simulate:
            command = checks.tests_command(checks.REHEARSED, 1, (checks.KERNEL_TESTS,))
        else:
            command = checks.tests_command(self.args.tests, max(1, min(12, len(os.sched_getaffinity(0)) - 4)))
        process = self.process(command, "tests", checks.TESTS_ENVIRONMENT)
        return process, lambda p: self.results.update(tests=checks.tests_summary(p))

    def start_sanitizers(self):
        """{tool: (process, what reads its result)}; a tool that is left out has its result already."""
        waiting, found, sanitizer = {}, self.results.setdefault("sanitizer", {}), checks.find_sanitizer()
        for tool in checks.SANITIZED:
            if self.args.simulate or not sanitizer:
                reason = "simulated: skipped" if self.args.simulate else "there is no compute-sanitizer"
                found[tool] = {"skipped": reason}
                continue
            command = checks.sanitizer_command(sanitizer, tool)
            process = self.process(command, tool, checks.SANITIZER_ENVIRONMENT, "sanitizer")
            waiting[tool] = process, lambda p, tool=tool: found.update({tool: checks.sanitizer_summary(p)})
        return waiting

    def read_compiled(self, worker):
        found = Findings(worker.journal)
        self.results["compile"] = found.rows
        self.results["notes"] += found.notes

    def measure(self, part, read):
        """Run a worker; what it has found so far is read and written again and again."""
        if self.limit(part) < (2 if self.args.simulate else 20):
            self.note(f"{part}: out of time")
            return
        notes, written = list(self.results["notes"]), 0.0

        def write(found, every=5.0):
            nonlocal written
            if time.monotonic() > written + every:
                self.results["notes"] = notes + found.notes
                read(self.results, found)
                self.save()
                written = time.monotonic()

        write(follow(self.worker(part), write), every=0.0)


def read_kernels(total, found):
    total["ceilings"] = found.facts.get("ceilings")
    total["kernels"] = found.rows_with("op")


def read_steps(total, found):
    total["steps"] = found.rows_with("implementation")
    total["agreement"] = {k: v for k, v in found.rows.items() if k.endswith(" agreement")}
    bandwidth = (total.get("ceilings") or {}).get("bandwidth")
    total["targets"] = targets.evaluate(total["steps"], bandwidth, found.facts.get("bytes of DenseNet-121"))


def read_profile(total, found):
    for row in total.get("steps", []):
        key = f"{row['net']} {row['dtype']} {row['batch_size']} {row['implementation']}"
        row.update(found.rows.get(key, {}))
