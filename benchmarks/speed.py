"""Speed and memory of training steps and of inference on a CPU: this package and all that it can be compared with.

    python benchmarks/speed.py                  all networks under two allocators: hours, most of them compiling
    python benchmarks/speed.py --no-compile     without the compiled implementations: about three quarters of an hour
    python benchmarks/speed.py --quick          tiny networks without a compiler, to see it work
    python benchmarks/speed.py --sweep --workloads cifar --implementations fused
                                                cost of an image by batch size and number of threads

Implementations (bench/implementations.py) are set up as they are fastest, and their gradients are compared before anything
is timed: those of eager ones in float64 on two images, those of every one in the very step that is timed, under the same
masks. What fails is a row that says so. Then all are timed in turn, in interleaved rounds, with a large matrix product and a
copy between them, which measure what the machine reaches meanwhile. All of it happens twice: with the allocator as the
system has it, and with one that keeps its pages (`--keep-pages`, `--no-keep-pages`: only one of them), because plain
networks on many systems spend much of a step on fresh pages. Workloads: bench/workloads.py, which also says why dropout is
left out.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from bench import environment, options, results, workloads
from bench.implementations import EAGER, IMPLEMENTATIONS, ON_CPU
from bench.runner import worker
from bench.speed import batches, report, run

ALLOCATORS = tuple(report.ALLOCATORS)
# A compiled implementation costs one to several minutes. Where compiled, memory budgets are tried in the layout that is the
# faster one for the plain network.
ASKED_FOR = ("compile-budget-0.5", "compile-budget-0.1", "compile-frozen", "fused-kept-channels-last")
DEFAULT = tuple(name for name in ON_CPU if name not in ASKED_FOR)
EAGER_DEFAULT = tuple(name for name in DEFAULT if IMPLEMENTATIONS[name].runner == "eager")
LATE = 1200  # seconds for what was being compiled at the deadline, and for one round of timing
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
    parser = options.new_parser(__doc__)
    add = parser.add_argument
    add("--workloads", type=options.names(workloads.NAMES), help=",".join(workloads.NAMES))
    add("--implementations", type=options.names(ON_CPU), help="some of " + ",".join(ON_CPU))
    add("--no-compile", action="store_true", help="leave out what torch.compile has to compile")
    add("--batch-size", type=int, help="in place of the workloads'")
    add("--rounds", type=int, default=5, help="interleaved steps of each implementation")
    add("--time-limit", type=float, help="seconds after which nothing is begun (default 14400; 600 with --sweep)")
    add("--threads", type=options.numbers, help="default: all; with --sweep 1 and all")
    add("--keep-pages", action=argparse.BooleanOptionalAction, help="with a malloc that keeps its pages; default: both")
    add("--capability", choices=CAPABILITIES, help="as on a lesser processor: torch and our kernels; with -all, oneDNN and "
        "MKL too")  # fmt: skip
    add("--compiled", metavar="FOLDER", type=Path, help="where compilers keep and find their results; first steps are "
        "then no measure of compiling")  # fmt: skip
    add("--sweep", action="store_true", help="eager steps of the first workload at several batch sizes and threads")
    add("--batch-sizes", type=options.numbers, default=batches.SIZES, help="of the sweep, default %(default)s")
    options.add_quick(parser)
    options.add_outputs(parser, "time against peak memory of the first training workload")
    worker.add_options(parser, ALLOCATORS)
    args = parser.parse_args(arguments)
    if args.sweep and (args.plot or set(args.implementations or ()) - set(EAGER)):
        parser.error("--sweep takes eager implementations and has no picture")
    if not args.sweep and len(args.threads or ()) > 1:
        parser.error("several numbers of --threads go with --sweep")
    implementations = EAGER_DEFAULT if args.quick or args.no_compile else DEFAULT
    args.workloads = args.workloads or (("cifar",) if args.sweep else workloads.NAMES)
    args.implementations = args.implementations or (("fused",) if args.sweep else implementations)
    args.threads = args.threads or ((1, environment.ALL_THREADS) if args.sweep else (environment.ALL_THREADS,))
    args.time_limit = args.time_limit or (600 if args.sweep else 14400)
    args.rounds = min(args.rounds, 2) if args.quick else args.rounds
    return args


def sweep(args):
    description = environment.begin(max(args.threads))
    deadline = time.monotonic() + args.time_limit

    def workload_of(size):
        return workloads.find(args.workloads[0], args.dtype, size, args.quick)

    rows = batches.measure(workload_of, args.implementations, args.batch_sizes, args.threads, args.rounds, deadline)
    return {"benchmark": "batches", "machine": description, "title": workload_of(None).title, "rows": rows}


def measure(args, folder, compiled):
    """Findings of each allocator. `compiled` is a folder for the compiler."""
    chosen = ALLOCATORS if args.keep_pages is None else ALLOCATORS[args.keep_pages : args.keep_pages + 1]
    end, found = time.monotonic() + args.time_limit, {}
    for i, allocator in enumerate(chosen):
        variables = {"TORCHINDUCTOR_CACHE_DIR": str(compiled)}
        if allocator == "keep-pages":
            variables |= environment.KEEP_PAGES
        seconds = (end - time.monotonic()) / (len(chosen) - i)
        found[allocator] = worker.follow(worker.Worker(allocator, folder, seconds, variables, LATE))
    return found


def main():
    args = parse_arguments()
    if args.worker:
        return run.work(args)
    if args.capability:
        environment.restart_with(CAPABILITIES[args.capability])
    if args.sweep:
        measured = sweep(args)
    else:
        capability = args.capability or "all that the processor has"
        description = environment.begin(args.threads[0], capability=capability)
        with worker.new_folder(args.logs) as folder, tempfile.TemporaryDirectory() as scratch:
            found = measure(args, folder, (args.compiled or Path(scratch)).resolve())
        measured = report.results_of(found, description, args.capability, args.dtype)
        if not measured["rows"]:
            notes = [note for findings in found.values() for note in findings.notes]
            sys.exit("Nothing was measured.\n" + "\n".join(notes))
    results.publish(args, measured)


if __name__ == "__main__":
    main()
