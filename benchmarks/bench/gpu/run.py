"""A run of gpu.py: its parts one after another, each with a deadline, and the results so far.

Nothing here is imported with the library: the first part may have to build it.
"""

import os
import time
from pathlib import Path

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


class Run:
    """The results so far, where they are written, and the time that is left."""

    def __init__(self, args, folder):
        self.args, self.folder = args, folder
        self.end = time.monotonic() + args.time_limit
        notes = ["A rehearsal on the CPU: no figure here means anything."] if args.simulate else []
        self.results = {"benchmark": "gpu", "machine": {}, "targets": [], "notes": notes}
        self.output = args.output or results_file()

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

    def say(self, text):
        print(text, flush=True)

    def say_ended(self, part):
        self.say(f"{part}: ended, {self.remaining():.0f} s are left")

    def worker(self, part, seconds):
        return Worker(part, self.folder, seconds, {}, LATE * (part != "compile"))


def results_file():
    import torch

    return ROOT / "benchmarks" / "results" / slug(torch.cuda.get_device_name(0)) / "gpu.json"


def slug(name):
    """NVIDIA H200 -> nvidia-h200"""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split()) or "gpu"


def build(run):
    """Build the library; False where nothing can be measured because of it."""
    if run.args.simulate:
        run.results["build"] = {"skipped": "simulated: skipped"}
        return True
    import torch

    run.say("build ...")
    major, minor = torch.cuda.get_device_capability(0)
    environment = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    process = Process(checks.build_command(), run.folder / "build.log", run.limit("build"), environment).wait()
    run.results["build"] = checks.build_summary(process)
    if process.status != 0:
        run.say("\n".join(process.tail(30)))
    return process.status == 0


def describe(run):
    """Describe device and library; False where the library does not load or has no kernels for the device."""
    from bench.gpu.device import open_device

    device = open_device(run.args.simulate)
    run.results["machine"] = device.describe()
    try:
        from bench import environment
        from densenet_ext import info
        from densenet_ext._ops import handles
    except ImportError as error:
        run.note(str(error))
        return False
    run.results["machine"] = environment.describe(device.name) | device.describe()
    run.results["machine"]["cuda_kernels"] = info.collect().get("CUDA kernels", "unknown")
    run.say(report.heading(run.results["machine"]) + "\n")
    if device.name not in handles.DEVICES:
        run.note(f"the library has no kernels for {device.name}: was it built where nvcc is?")
    return device.name in handles.DEVICES


def check(run):
    """Run tests, compute-sanitizer and the compiler side by side: nothing of it is timed, and all cores are used."""
    waiting = {}
    if run.wants("tests"):
        waiting["tests"] = _start_tests(run)
    if run.wants("sanitizer"):
        waiting |= _start_sanitizers(run)
    names = run.args.implementations or IMPLEMENTATIONS
    if run.wants("compile") and run.wants("steps") and any(IMPLEMENTATIONS[n].runner == "compile" for n in names):
        seconds = run.limit("compile")
        if run.args.simulate or seconds >= COMPILING:
            waiting["compile"] = run.worker("compile", seconds), lambda worker: _read_compiled(run, worker)
        else:
            run.note("compile: not enough time for anything")
            (run.folder / "compile.jsonl").touch()  # nothing was compiled
    _wait_for(run, waiting)


def _start_tests(run):
    if run.args.simulate:
        command = checks.tests_command(checks.REHEARSED, 1, (checks.KERNEL_TESTS,))
    else:
        command = checks.tests_command(run.args.tests, max(1, min(12, len(os.sched_getaffinity(0)) - 4)))
    process = Process(command, run.folder / "tests.log", run.limit("tests"), checks.TESTS_ENVIRONMENT)
    return process, lambda p: run.results.update(tests=checks.tests_summary(p))


def _start_sanitizers(run):
    """{tool: (process, what reads its result)}; a tool that is left out has its result already."""
    waiting, found, sanitizer = {}, run.results.setdefault("sanitizer", {}), checks.find_sanitizer()
    for tool in checks.SANITIZED:
        if run.args.simulate or not sanitizer:
            found[tool] = {"skipped": "simulated: skipped" if run.args.simulate else "there is no compute-sanitizer"}
            continue
        command, log = checks.sanitizer_command(sanitizer, tool), run.folder / f"{tool}.log"
        process = Process(command, log, run.limit("sanitizer"), checks.SANITIZER_ENVIRONMENT)
        waiting[tool] = process, lambda p, tool=tool: found.update({tool: checks.sanitizer_summary(p)})
    return waiting


def _read_compiled(run, worker):
    found = Findings(worker.journal)
    run.results["compile"] = found.rows
    run.results["notes"] += found.notes


def _wait_for(run, waiting):
    """Wait until all have ended; the results of each are written when it has."""
    try:
        while waiting:
            for name in [name for name, (process, _) in waiting.items() if process.poll()]:
                process, finish = waiting.pop(name)
                finish(process)
                run.save()
                run.say_ended(name)
            time.sleep(0.2)
    finally:  # interrupted: nothing that was started is left behind
        for process, _ in waiting.values():
            process.kill()


def measure(run, part, read):
    """Run a worker; what it has found so far is read and written again and again."""
    seconds = run.limit(part)
    if seconds < (2 if run.args.simulate else 20):
        run.note(f"{part}: out of time")
        return
    notes, written = list(run.results["notes"]), 0.0

    def write(found, every=0.0):
        nonlocal written
        if time.monotonic() > written + every:
            run.results["notes"] = notes + found.notes
            read(run, found)
            run.save()
            written = time.monotonic()

    write(follow(run.worker(part, seconds), lambda found: write(found, every=5.0)))


def read_kernels(run, found):
    run.results["ceilings"] = found.facts.get("ceilings")
    run.results["kernels"] = found.rows_with("op")


def read_steps(run, found):
    rows = run.results["steps"] = found.rows_with("implementation")
    run.results["agreement"] = {k: v for k, v in found.rows.items() if k.endswith(" agreement")}
    bandwidth = (run.results.get("ceilings") or {}).get("bandwidth")
    reached = targets.evaluate(rows, bandwidth, found.facts.get("bytes of DenseNet-121"))
    run.results["targets"] = [target.row() for target in reached]


def read_profile(run, found):
    rows = {f"{r['net']} {r['dtype']} {r['batch_size']} {r['implementation']}": r for r in run.results.get("steps", [])}
    for key, values in found.rows.items():
        if key in rows:
            rows[key].update(values)


def lead(args, folder):
    """All parts; the exit status."""
    run = Run(args, Path(folder))
    try:
        if (run.wants("build") and not build(run)) or not describe(run):
            run.say("\n".join(["Nothing was measured.", *run.results["notes"]]))
            return 1
        run.save()
        check(run)
        for part, read in (("kernels", read_kernels), ("steps", read_steps), ("profile", read_profile)):
            if run.wants(part):
                measure(run, part, read)
                run.say_ended(part)
    finally:
        run.save()
    run.say("\n\n".join(report.sections_of(run.results)[::-1]) + "\n")
    seconds = args.time_limit - run.remaining()
    run.say(f"Written: {run.output} and {run.output.with_suffix('.md').name}, after {seconds:.0f} s")
    return 0
