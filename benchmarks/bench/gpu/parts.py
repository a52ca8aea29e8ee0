"""The parts of gpu.py that are processes of their own and use the GPU."""

import time

from bench.gpu import kernels, steps
from bench.gpu.device import open_device
from bench.gpu.groups import GROUPS, choose_groups
from bench.roofline import step_bytes
from bench.runner.journal import Findings, Journal


def work(args):
    """Measure one part, into its journal in `folder`."""
    deadline, journal = time.monotonic() + args.seconds, Journal(args.folder / f"{args.worker}.jsonl")
    device = open_device(args.simulate)
    variant = "" if args.variant == "BC" else args.variant
    groups = choose_groups(device.name, variant, args.groups, args.implementations, device.tiny)
    journal.fact("device", device.describe())
    if args.worker == "kernels":
        kernels.measure(device, journal, deadline)
    elif args.worker == "compile":
        steps.compile_beforehand(device, groups, journal, deadline)
    elif args.worker == "profile":
        steps.count_kernels(device, groups, journal, deadline)
    else:
        largest = choose_groups(device.name, variant, (GROUPS[0].key,), tiny=device.tiny)[0]
        journal.fact("bytes of DenseNet-121", step_bytes(largest.spec_of("fused")))
        compiled = args.folder / "compile.jsonl"
        steps.measure(device, groups, journal, deadline, Findings(compiled).rows if compiled.exists() else None)
