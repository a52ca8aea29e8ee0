"""Builds, checks and measures densenet_ext on one NVIDIA GPU, in one call of at most eight minutes.

    python benchmarks/gpu.py                        results in benchmarks/results/<device>.json and .md
    python benchmarks/gpu.py --simulate --output /tmp/rehearsal.json

Parts, in this order: build; tests, compute-sanitizer and compiling the plain networks, all at once since none is timed;
kernels; training steps; a profile that counts the steps' kernels. Each part has a deadline, what does not fit is left
out with a note, and the results are written whenever there is something new. Parts that use the GPU are processes of
their own: one that crashes or hangs costs the cell that it was in. With --simulate every part runs on the CPU, at tiny
sizes, over the CUDA kernels compiled for it.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gpu_checks
import gpu_report
from gpu_checks import ROOT, Process
from gpu_worker import Worker, work
from journal import Findings
from tqdm import tqdm

PARTS = ("build", "tests", "sanitizer", "compile", "kernels", "steps", "profile")
# Seconds at most, of all that is left where there is none. The checks leave the measurements those of KEPT_FOR.
LIMITS = {"build": 240, "tests": 150, "sanitizer": 120, "kernels": 50, "profile": 60}
KEPT_FOR = {"kernels": 50, "steps": 130, "profile": 30}
COMPILING = 150  # seconds at least for compiling, where anything is to come of it
VARIANTS = ("BC", "vanilla", "A", "B", "A+B")


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--simulate", nargs="?", const="simt", choices=("simt", "cpu"), help="rehearse on the CPU: over the CUDA kernels "
        "compiled for it (tests/simt), or with cpu over the CPU's own")  # fmt: skip
    add(
        "--output",
        metavar="FILE",
        type=Path,
        help="JSON file, its tables beside it; default benchmarks/results/<device>.json",
    )
    add("--time-limit", type=float, default=460, help="seconds for everything (default 460)")
    add("--parts", type=_names(PARTS), default=PARTS, help="some of " + ",".join(PARTS))
    add("--no-build", action="store_true", help="the library is built already")
    add("--tests", metavar="EXPRESSION", default="cuda", help="which tests, as pytest's -k (default cuda)")
    add("--variant", choices=VARIANTS, default="A+B", help="of the CIFAR network (default A+B, BC: without dropout)")
    add("--groups", metavar="WORDS", help="training steps only of groups with one of these, such as densenet121,cifar")
    add("--implementations", metavar="NAMES", help="training steps only of these, such as plain,fused")
    add("--logs", metavar="FOLDER", type=Path, help="keep what the processes print, and their journals")
    add("--worker", choices=("compile", "kernels", "steps", "profile"), help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    add("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.simulate and not args.output and not args.worker:
        parser.error("--simulate needs --output: a rehearsal's figures are no results")
    return args


def _names(known):
    def parse(text):
        names = tuple(text.split(","))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
        return names

    return parse


class Run:
    """The results so far, where they are written, and the time that is left."""

    def __init__(self, args, folder):
        self.args, self.folder = args, folder
        self.end = time.monotonic() + args.time_limit
        notes = ["A rehearsal on the CPU: no figure here means anything."] if args.simulate else []
        self.results = {"machine": {}, "targets": [], "notes": notes}
        self.output = args.output or results_file()
        library = os.environ.get("DENSENET_EXT_LIBRARY")
        self.environment = {"DENSENET_EXT_LIBRARY": library} if library else {}

    def left(self):
        return self.end - time.monotonic()

    def wants(self, part):
        return part in self.args.parts and not (part == "build" and self.args.no_build)

    def limit(self, part):
        """Seconds that a part may take, so that those after it have what is kept for them."""
        order = {"build": 0, "tests": 1, "sanitizer": 1, "compile": 1, "kernels": 2, "steps": 3, "profile": 4}
        kept = sum(s for p, s in KEPT_FOR.items() if order[p] > order[part] and self.wants(p))
        scale = min(1.0, self.args.time_limit / 460)
        return max(0.0, min(LIMITS.get(part, self.left()), self.left() - kept * scale - 8))

    def save(self):
        gpu_report.write(self.output, self.results)

    def say(self, text):
        print(text, flush=True)


def build(run):
    """False where nothing can be measured because of it."""
    if run.args.simulate:
        run.results["build"] = {"skipped": "simulated: skipped"}
        return True
    import torch

    run.say("build ...")
    major, minor = torch.cuda.get_device_capability(0)
    environment = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    process = Process(gpu_checks.build_command(), run.folder / "build.log", run.limit("build"), environment).wait()
    run.results["build"] = gpu_checks.build_summary(process)
    if process.process.returncode != 0:
        run.say("\n".join(process.tail(30)))
    return process.process.returncode == 0


def describe(run):
    """What is measured on and with; False where the library does not load or has no kernels for the device."""
    import gpu_device

    device = gpu_device.open_device(run.args.simulate)
    run.results["machine"] = device.describe()
    try:
        import machine

        from densenet_ext import info, ops
    except ImportError as error:
        run.results["notes"].append(str(error))
        return False
    run.results["machine"] = machine.describe(device.name) | device.describe()
    run.results["machine"]["cuda_kernels"] = info.collect().get("CUDA kernels", "unknown")
    run.say(gpu_report.heading(run.results["machine"]) + "\n")
    if device.name not in ops.DEVICES:
        run.results["notes"].append(f"the library has no kernels for {device.name}: was it built where nvcc is?")
    return device.name in ops.DEVICES


def results_file():
    import torch

    return ROOT / "benchmarks" / "results" / f"{slug(torch.cuda.get_device_name(0))}.json"


def slug(name):
    """NVIDIA H200 -> nvidia-h200"""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split()) or "gpu"


def check(run):
    """Tests, compute-sanitizer and the compiler side by side: nothing of it is timed, and all cores are used."""
    waiting, simulated = {}, run.args.simulate
    cores = len(os.sched_getaffinity(0))
    if run.wants("tests"):
        junit, expression = run.folder / "junit.xml", run.args.tests
        paths = ("tests/ops/test_kernels.py",) if simulated else ()
        command = gpu_checks.tests_command(
            junit,
            gpu_checks.REHEARSED if simulated else expression,
            1 if simulated else max(1, min(12, cores - 4)),
            paths,
        )
        process = Process(command, run.folder / "tests.log", run.limit("tests"), run.environment)
        waiting["tests"] = process, lambda p: run.results.update(tests=gpu_checks.tests_summary(p, junit))
    if run.wants("sanitizer"):
        found = run.results["sanitizer"] = {}
        sanitizer = gpu_checks.find_sanitizer()
        for tool in gpu_checks.SANITIZED:
            if simulated or not sanitizer:
                found[tool] = {"skipped": "simulated: skipped" if simulated else "there is no compute-sanitizer"}
                continue
            command = gpu_checks.sanitizer_command(sanitizer, tool)
            environment = gpu_checks.SANITIZER_ENVIRONMENT
            process = Process(command, run.folder / f"{tool}.log", run.limit("sanitizer"), environment)
            waiting[tool] = process, lambda p, tool=tool: found.update({tool: gpu_checks.sanitizer_summary(p)})
    compiled = "compile" in (run.args.implementations or "compile").split(",")
    if run.wants("compile") and run.wants("steps") and compiled:
        seconds = run.limit("compile")
        if simulated or seconds >= COMPILING:
            worker = Worker("compile", run.args, run.folder, seconds, run.environment)
            waiting["compile"] = worker, lambda w: read_compiled(run, w)
        else:
            run.results["notes"].append("compile: not enough time for anything")
            (run.folder / "compile.jsonl").touch()  # nothing was compiled
    wait_for(run, waiting)


def wait_for(run, waiting):
    """Until all have ended; the results of each are written when it has."""
    try:
        while waiting:
            for name in [name for name, (process, _) in waiting.items() if process.poll()]:
                process, finish = waiting.pop(name)
                finish(process)
                run.save()
                run.say(f"{name}: ended, {run.left():.0f} s are left")
            time.sleep(0.2)
    finally:  # interrupted: nothing that was started is left behind
        for process, _ in waiting.values():
            process.kill()


def read_compiled(run, worker):
    found = Findings(worker.journal)
    run.results["compile"] = found.rows
    run.results["notes"] += found.notes


def measure(run, part, read):
    """Runs a worker; what it has found so far is read and written again and again."""
    seconds = run.limit(part)
    if seconds < (2 if run.args.simulate else 20):
        run.results["notes"].append(f"{part}: out of time")
        return
    worker, written = Worker(part, run.args, run.folder, seconds, run.environment), 0.0
    notes = list(run.results["notes"])
    try:
        with tqdm(desc=part, unit="cell", disable=None) as progress:
            ended = False
            while not ended:
                ended = worker.poll()
                if ended or time.monotonic() > written + 5:
                    found, written = Findings(worker.journal), time.monotonic()
                    run.results["notes"] = notes + found.notes
                    read(run, found)
                    run.save()
                    progress.total = found.facts.get("cells")
                    progress.update(len(found.begun) - progress.n)
                time.sleep(0.2)
    finally:
        worker.kill()


def read_kernels(run, found):
    run.results["ceilings"] = found.facts.get("ceilings")
    run.results["kernels"] = [row for row in found.rows.values() if "op" in row]


def read_steps(run, found):
    import gpu_targets
    from roofline import Architecture

    rows = [row for row in found.rows.values() if "implementation" in row]
    run.results["steps"] = rows
    run.results["agreement"] = {k: v for k, v in found.rows.items() if k.endswith(" agreement")}
    nets = {
        n: Architecture(**a | {"blocks": tuple(a["blocks"])}) for n, a in found.facts.get("architectures", {}).items()
    }
    bandwidth = (run.results.get("ceilings") or {}).get("bandwidth")
    run.results["targets"] = gpu_targets.as_rows(gpu_targets.evaluate(rows, bandwidth, nets))


def read_profile(run, found):
    rows = {f"{r['net']} {r['dtype']} {r['batch_size']} {r['implementation']}": r for r in run.results.get("steps", [])}
    for key, values in found.rows.items():
        if key in rows:
            rows[key].update(values)


def lead(args, folder):
    """All parts; the exit status."""
    run = Run(args, folder)
    try:
        if (run.wants("build") and not build(run)) or not describe(run):
            run.say("\n".join(["Nothing was measured.", *run.results["notes"]]))
            return 1
        run.save()
        check(run)
        for part, read in (("kernels", read_kernels), ("steps", read_steps), ("profile", read_profile)):
            if run.wants(part):
                measure(run, part, read)
                run.say(f"{part}: ended, {run.left():.0f} s are left")
    finally:
        run.save()
    for _, text in gpu_report.sections_of(run.results)[::-1]:
        run.say(text + "\n")
    seconds = args.time_limit - run.left()
    run.say(f"Written: {run.output} and {run.output.with_suffix('.md').name}, after {seconds:.0f} s")
    return 0


def main():
    args = parse_arguments()
    sys.path.insert(0, str(ROOT))  # the library that is built here, and no other that may be installed
    if args.worker:
        return work(args)
    if args.simulate == "simt" and "DENSENET_EXT_LIBRARY" not in os.environ:
        library = subprocess.run(
            [sys.executable, ROOT / "tests" / "simt" / "build.py"], stdout=subprocess.PIPE, text=True, check=True
        )
        os.environ["DENSENET_EXT_LIBRARY"] = library.stdout.strip().splitlines()[-1]
        os.execv(sys.executable, [sys.executable, *sys.argv])
    if not args.simulate:
        import torch

        if not torch.cuda.is_available():
            sys.exit(
                "This benchmark needs an NVIDIA GPU and there is none here; "
                "`python benchmarks/gpu.py --simulate --output FILE` rehearses it on the CPU."
            )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended too
    if args.logs:
        args.logs.mkdir(parents=True, exist_ok=True)
        for journal in args.logs.glob("*.jsonl"):  # of an earlier run: nothing of it is to be continued
            journal.unlink()
        return lead(args, args.logs.resolve())
    with tempfile.TemporaryDirectory() as folder:
        return lead(args, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
