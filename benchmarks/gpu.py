"""Builds, checks and measures densenet_ext on one NVIDIA GPU, in one call of at most eight minutes.

    python benchmarks/gpu.py                        results in benchmarks/results/<device>/gpu.json and .md
    python benchmarks/gpu.py --simulate --output /tmp/rehearsal.json

Parts, in this order: build; tests, compute-sanitizer and compiling the plain networks, all at once since none is timed;
kernels; training steps; a profile that counts the steps' kernels. Each part has a deadline, what does not fit is left
out with a note, and the results are written whenever there is something new. Parts that use the GPU are processes of
their own: one that crashes or hangs costs the cell that it was in. With --simulate every part runs on the CPU, at tiny
sizes, over the CUDA kernels compiled for it.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench import ROOT, options
from bench.gpu.run import PARTS, TIME_LIMIT, Run
from bench.implementations import ON_GPU
from bench.runner import worker
from bench.runner.journal import Findings, Journal

VARIANTS = ("BC", "vanilla", "A", "B", "A+B")


def parse_arguments(arguments=None):
    parser = options.new_parser(__doc__)
    add = parser.add_argument
    add("--simulate", nargs="?", const="simt", choices=("simt", "cpu"), help="rehearse on the CPU: over the CUDA kernels "
        "compiled for it (tests/simt), or with cpu over the CPU's own")  # fmt: skip
    add("--output", metavar="FILE", type=Path, help="JSON file, its tables beside it; default "
        "benchmarks/results/<device>/gpu.json")  # fmt: skip
    add("--time-limit", type=float, default=TIME_LIMIT, help="seconds for everything (default %(default)s)")
    add("--parts", type=options.names(PARTS), default=PARTS, help="some of " + ",".join(PARTS))
    add("--no-build", action="store_true", help="the library is built already")
    add("--tests", metavar="EXPRESSION", default="cuda", help="which tests, as pytest's -k (default cuda)")
    add("--variant", choices=VARIANTS, default="A+B", help="of the CIFAR network (default A+B, BC: without dropout)")
    add("--groups", metavar="WORDS", type=options.words, default=(), help="training steps only of groups with one of "
        "these, such as densenet121,cifar")  # fmt: skip
    add("--implementations", metavar="NAMES", type=options.names(ON_GPU), default=(), help="training steps only of these: "
        + ",".join(ON_GPU))  # fmt: skip
    worker.add_options(parser, ("compile", "kernels", "steps", "profile"))
    args = parser.parse_args(arguments)
    if args.simulate and not args.output and not args.worker:
        parser.error("--simulate needs --output: a rehearsal's figures are no results")
    return args


def work(args):
    """Measure one part on the GPU, into its journal in `folder`."""
    from bench.gpu import kernels, steps
    from bench.gpu.device import open_device
    from bench.gpu.groups import choose_groups

    deadline, journal = time.monotonic() + args.seconds, Journal(args.folder / f"{args.worker}.jsonl")
    device = open_device(args.simulate)
    journal.fact("device", device.describe())
    variant = "" if args.variant == "BC" else args.variant
    groups = choose_groups(device.name, variant, args.groups, args.implementations, device.tiny)
    if args.worker == "kernels":
        kernels.measure(device, journal, deadline)
    elif args.worker == "compile":
        steps.compile_beforehand(device, groups, journal, deadline)
    elif args.worker == "profile":
        steps.count_kernels(device, groups, journal, deadline)
    else:
        compiled = args.folder / "compile.jsonl"
        steps.measure(device, groups, journal, deadline, Findings(compiled).rows if compiled.exists() else None)


def restart_with_simulated_device():
    """Build the CUDA kernels for the CPU, and run this command again with them."""
    build = [sys.executable, ROOT / "tests" / "simt" / "build.py"]
    library = subprocess.run(build, stdout=subprocess.PIPE, text=True, check=True)
    os.environ["DENSENET_EXT_LIBRARY"] = library.stdout.strip().splitlines()[-1]
    os.execv(sys.executable, [sys.executable, *sys.argv])


def main():
    args = parse_arguments()
    sys.path.insert(0, str(ROOT))  # the library that is built here, and no other that may be installed
    if args.worker:
        return work(args)
    if args.simulate == "simt" and "DENSENET_EXT_LIBRARY" not in os.environ:
        restart_with_simulated_device()
    if not args.simulate:
        import torch

        if not torch.cuda.is_available():
            sys.exit(
                "This benchmark needs an NVIDIA GPU and there is none here; "
                "`python benchmarks/gpu.py --simulate --output FILE` rehearses it on the CPU."
            )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended too
    with worker.new_folder(args.logs) as folder:
        return Run(args, folder).lead()


if __name__ == "__main__":
    sys.exit(main())
