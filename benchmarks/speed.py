"""Speed and memory of training steps and of inference on a CPU: this package and all that it can be compared with.

    python benchmarks/speed.py                  all networks and peers under two allocators: hours, most of them compiling
    python benchmarks/speed.py --no-compile     without the compiled peers: about three quarters of an hour
    python benchmarks/speed.py --quick          tiny networks without a compiler, to see it work

Peers (speed_steps.py) are set up as they are fastest, and their gradients are compared before anything is timed: those of
eager peers in float64 on two images, those of every peer in the very step that is timed, under the same masks. What fails
is a row that says so. Then all peers are timed in turn, in interleaved rounds, with a large matrix product and a copy
between them, which measure what the machine reaches meanwhile. All of it happens twice: with the allocator as the system
has it, and with one that keeps its pages (`--keep-pages`, `--no-keep-pages`: only one of them), because plain networks on
many systems spend much of a step on fresh pages. Workloads: workloads.py, which also says why dropout is left out.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import machine
import speed_report
import torch
import workloads
from gpu_worker import Worker
from journal import Findings, Journal
from speed_steps import PEERS
from tqdm import tqdm

ALLOCATORS = ("default", "keep-pages")
# A compiled peer costs one to several minutes. Where compiled, these memory budgets are tried in the layout that is
# the faster one for the plain network.
DEFAULT = tuple(n for n in PEERS if n not in ("compile-budget-0.5", "compile-budget-0.1", "compile-frozen"))
EAGER = tuple(n for n in DEFAULT if "compile" not in n)
CAPABILITIES = {
    "avx512": {"DENSENET_EXT_CPU_CAPABILITY": "avx512"},  # without AMX, which float32 of torch's own does not use
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "DENSENET_EXT_CPU_CAPABILITY": "avx2"},
    # the libraries under torch's convolutions and matrix products too
    "avx2-all": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "DENSENET_EXT_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workloads", type=machine.names(workloads.NAMES), default=workloads.NAMES, help=",".join(workloads.NAMES))
    add("--implementations", type=machine.names(PEERS), help="some of " + ",".join(PEERS))
    add("--no-compile", action="store_true", help="leave out what torch.compile has to compile")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="bfloat16: autocast")
    add("--batch-size", type=int, help="in place of the workloads'")
    add("--rounds", type=int, default=5, help="interleaved steps of each peer")
    add("--time-limit", type=float, default=14400, help="seconds after which no peer and no round is begun (default 14400)")  # fmt: skip
    add("--threads", type=int, default=torch.get_num_threads())
    add("--keep-pages", action=argparse.BooleanOptionalAction, help="with a malloc that keeps its pages; default: both")
    add("--capability", choices=CAPABILITIES, help="as on a lesser processor: torch and our kernels; with -all, oneDNN and "
        "MKL too")  # fmt: skip
    add("--quick", action="store_true", help="tiny networks and no compiled peers: no figure means anything")
    add("--compiled", metavar="FOLDER", type=Path, help="where compilers keep and find their results; first steps are "
        "then no measure of compiling")  # fmt: skip
    add("--logs", metavar="FOLDER", type=Path, help="keep what the processes print, and their journals")
    add("--json", metavar="FILE")
    add("--csv", metavar="FILE")
    add("--plot", metavar="FILE", help="time against peak memory of the first training workload")
    add("--worker", choices=ALLOCATORS, help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    add("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.implementations = args.implementations or (EAGER if args.quick or args.no_compile else DEFAULT)
    args.rounds = min(args.rounds, 2) if args.quick else args.rounds
    return args


class Child(Worker):
    """This script in a process with one allocator; one that dies is followed by another that leaves out its cell."""

    late = 1200  # seconds for the peer that was being compiled at the deadline, and for one round of timing

    def __init__(self, allocator, args, folder, seconds, compiled):
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(compiled)}
        if allocator == "keep-pages":
            environment |= machine.KEEP_PAGES
        super().__init__(allocator, args, folder, seconds, environment)

    def command(self, seconds):
        inner = ["--worker", self.part, "--folder", str(self.folder), "--seconds", f"{seconds:.0f}"]
        return [sys.executable, str(Path(__file__)), *sys.argv[1:], *inner]


def work(args):
    torch.set_num_threads(args.threads)
    import speed_worker

    journal = Journal(args.folder / f"{args.worker}.jsonl")
    description = machine.describe("cpu")
    del description["command"]  # that of a worker, in whatever folder
    journal.fact("machine", description)
    speed_worker.measure(
        journal,
        args.workloads,
        args.implementations,
        time.monotonic() + args.seconds,
        dtype=args.dtype,
        rounds=args.rounds,
        batch_size=args.batch_size,
        tiny=args.quick,
    )


def follow(worker, seconds_a_line=60):
    """Waits for a process; returns what it found. A bar tells how far it is; a line each minute where there is no terminal."""
    began = said = time.monotonic()
    try:
        with tqdm(desc=worker.part, unit="cell", disable=None) as progress:
            ended = False
            while not ended:
                ended = worker.poll()
                found = Findings(worker.journal)
                progress.total = found.facts.get("cells")
                progress.update(len(found.begun) - progress.n)
                if progress.disable and time.monotonic() - said >= seconds_a_line:
                    said = time.monotonic()
                    count = f"{len(found.begun)} of {found.facts.get('cells', '?')} cells"
                    print(
                        f"{worker.part}: {count}, {(said - began) / 60:.0f} min, now {found.current or 'between cells'}",
                        file=sys.stderr,
                        flush=True,
                    )
                time.sleep(0.5)  # it runs beside what is timed
    finally:
        worker.kill()
    return found


def measure(args, folder, compiled):
    """Findings of each allocator. `compiled`: a folder for the compiler, new unless one was named."""
    chosen = ALLOCATORS if args.keep_pages is None else ALLOCATORS[args.keep_pages : args.keep_pages + 1]
    end = time.monotonic() + args.time_limit
    return {
        allocator: follow(Child(allocator, args, folder, (end - time.monotonic()) / (len(chosen) - i), compiled))
        for i, allocator in enumerate(chosen)
    }


def main():
    args = parse_arguments()
    if args.worker:
        return work(args)
    if args.capability:
        machine.restart_with(CAPABILITIES[args.capability])
    torch.set_num_threads(args.threads)
    description = machine.describe("cpu") | {"capability": args.capability or "all that the processor has"}
    print(machine.heading(description) + "\n", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.logs or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for journal in folder.glob("*.jsonl"):  # of an earlier run: nothing of it is to be continued
            journal.unlink()
        found = measure(args, folder, (args.compiled or Path(scratch) / "compiled").resolve())
    rows = speed_report.rows_of(found)
    if not rows:
        notes = [note for findings in found.values() for note in findings.notes]
        sys.exit("Nothing was measured.\n" + "\n".join(notes))
    targets = speed_report.targets(rows, args.capability, args.dtype)
    print(speed_report.markdown(rows, found, targets))
    if args.json:
        facts = {allocator: findings.facts for allocator, findings in found.items()}
        notes = {allocator: findings.notes for allocator, findings in found.items()}
        machine.write_json(args.json, description, rows, facts=facts, notes=notes, targets=targets)
    if args.csv:
        machine.write_csv(args.csv, description, speed_report.flat(rows))
    if args.plot:
        import plot  # matplotlib, which measuring does without

        plot.plot_speed(rows, description, args.plot)


if __name__ == "__main__":
    main()
