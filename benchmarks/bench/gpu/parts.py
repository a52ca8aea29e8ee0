"""The parts of gpu.py that are processes of their own and use the GPU."""

import time

from bench.gpu import kernels, steps
from bench.gpu.device import open_device
from bench.gpu.groups import GROUPS, Request
from bench.roofline import step_bytes
from bench.runner.journal import Findings, Journal


def work(args):
    """Measure one part, into its journal in `folder`."""
    deadline = time.monotonic() + args.seconds
    journal, tiny = Journal(args.folder / f"{args.worker}.jsonl"), bool(args.simulate)
    device = open_device(args.simulate)
    variant = "" if args.variant == "BC" else args.variant
    request = Request(device, variant, tiny, args.groups, args.implementations)
    journal.fact("device", device.describe())
    if args.worker == "kernels":
        kernels.measure(device, journal, deadline, tiny)
    elif args.worker == "compile":
        steps.compile_beforehand(request, journal, deadline)
    elif args.worker == "profile":
        steps.count_kernels(request, journal, deadline)
    else:
        journal.fact("bytes of DenseNet-121", step_bytes(request.spec(GROUPS[0], "fused")))
        compiled = args.folder / "compile.jsonl"
        steps.measure(request, journal, deadline, Findings(compiled).rows if compiled.exists() else None)
