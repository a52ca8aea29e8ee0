"""The budget of one fused training step on a CPU: milliseconds by phase, measured inside a real step, beside their floors.

    python benchmarks/phases.py --workloads cifar --implementations fused,fused-kept

A step is profiled some times; a phase is all calls of one kernel op on maps of one size, the stem, the classifier with the
loss, the optimizer, or what is left. Its floor is the longer of its bytes at a copy's rate and its operations at a large
matrix product's (roofline.py), both rates measured between the steps; operations as the fused network does them, so that
their sum is less than the plain network's. The profiler's own time is in the phases: the unprofiled step stands below.
"""

import argparse
import statistics
from collections import defaultdict

import harness
import machine
import roofline
import torch
import workloads
from limits import Limits, describe, floor
from roofline import STORAGE_BYTES, op_bytes, op_flops, step_ops
from speed_steps import PEERS, new_step
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

PARTS = ("forward", "backward", "optimizer")
STAGE = "stages, outside of kernels"
FUSED = ("dense_stage", "dense_tail", "dense_block", "new_gradients", "dense_stem")
FUSED += ("DenseStage", "DenseTail", "DenseBlock")
# by words in the names of torch's operators and of autograd's nodes; the first that fits
OTHERS = {
    "gradients handed over": ("AccumulateGrad",),
    "running statistics": ("_foreach", "select", "split", "aten::mul"),
    "classifier and loss": ("linear", "cross_entropy", "Nll", "LogSoftmax", "Addmm", "TBackward", "ones_like"),
    "stem": ("conv", "Conv", "batch_norm", "BatchNorm", "relu", "Relu", "pool", "Pool", "add_"),
}


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    training = [name for name in workloads.NAMES if not name.endswith("-inference")]
    fused = [name for name in PEERS if name.startswith("fused") and PEERS[name].runner == "eager"]
    add("--workloads", type=machine.names(training), default=("cifar",), help=",".join(training))
    add("--implementations", type=machine.names(fused), default=("fused", "fused-kept"), help=",".join(fused))
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--batch-size", type=int)
    add("--rounds", type=int, default=7)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--quick", action="store_true", help="tiny networks: no figure means anything")
    add("--json", metavar="FILE")
    add("--csv", metavar="FILE")
    return parser.parse_args(arguments)


def profiled(step):
    """{(part, phase, size): (milliseconds, calls)} of one step; size is a height of maps, 0 where there is none."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        with record_function("phase: forward"):
            loss = step.forward()
        with record_function("phase: backward"):
            loss.backward()
            del loss
        with record_function("phase: optimizer"):
            step.optimizer.step()
            step.optimizer.zero_grad()
    found = defaultdict(lambda: [0.0, 0])

    def count(part, phase, size, milliseconds, calls=1):
        entry = found[part, phase, size]
        entry[0] += milliseconds
        entry[1] += calls

    events = recorded.events()
    for part in PARTS:
        root = next(e for e in events if e.name == f"phase: {part}")
        rest = root.cpu_time_total
        for event in root.cpu_children:
            rest -= event.cpu_time_total
            if any(op in event.name for op in FUSED):
                kernels = list(_kernels(event))
                for kernel in kernels:
                    count(part, kernel.name.split("::")[1], _side(kernel, step.spec), kernel.cpu_time_total / 1e3)
                outside = event.cpu_time_total - sum(k.cpu_time_total for k in kernels)
                count(part, STAGE, 0, outside / 1e3)
            else:
                count(part, _phase(part, event.name), 0, event.cpu_time_total / 1e3)
        count(part, "rest", 0, rest / 1e3, 0)
    return dict(found)


def _kernels(event):
    """Kernel ops below an event, whatever lies between."""
    for child in event.cpu_children:
        if child.name.startswith("densenet_ext::") and not any(op in child.name for op in FUSED):
            yield child
        else:
            yield from _kernels(child)


def _side(kernel, spec):
    """Height of the largest maps among its arguments; tables and weights of 3x3 or 1x1 are none."""
    maps = [
        s
        for s in kernel.input_shapes
        if len(s) == 4 and s[0] == spec.batch_size and s[2] == s[3] and s[2] not in (1, 3)
    ]
    return max((s[2] for s in maps), default=0)


def _phase(part, name):
    if part == "optimizer":
        return "optimizer"
    return next((phase for phase, words in OTHERS.items() if any(w in name for w in words)), "rest")


def floors(spec, keep, rates):
    """{(part, phase, size): seconds} that no version takes less than."""
    net, n, e = spec.architecture(), spec.batch_size, STORAGE_BYTES[spec.dtype]
    found = defaultdict(float)
    forward = list(step_ops(net, n, keep, training=False))
    both = list(step_ops(net, n, keep))
    for op, size in forward:
        both.remove((op, size))
    for part, ops in (("forward", forward), ("backward", both)):
        for op, size in ops:
            found[part, op, size.height] += floor(op_bytes(op, size, e), op_flops(op, size), rates)
        moved = roofline.stem_bytes(net, n, e, training=False)
        moved = moved if part == "forward" else roofline.stem_bytes(net, n, e) - moved
        found[part, "stem", 0] = floor(moved, roofline.stem_flops(net, n), rates)
    parameters = roofline.parameters(net)
    found["optimizer", "optimizer", 0] = 5 * parameters * roofline.ARITHMETIC_BYTES / rates["bytes"]
    return found


def measure(workload, name, args):
    """Rows by phase, and facts of the whole step."""
    step = new_step(workload, name)
    step.first = None
    limits, profiles = Limits(args.dtype, args.quick), []
    samples = {"step": step.timed, "profile": lambda: profiles.append(profiled(step))} | limits.samples()
    samples["profile"]()  # the first is slow
    profiles.clear()
    times = harness.interleave(samples, args.rounds, seconds=lambda sample: sample())
    rates, spec = limits.rates(times), step.spec
    least = floors(spec, name == "fused-kept", rates)
    rows = []
    for key in dict.fromkeys(key for found in profiles for key in found):
        part, phase, size = key
        ms = statistics.median(found.get(key, (0.0, 0))[0] for found in profiles)
        row = {"workload": workload.name, "implementation": name, "part": part, "phase": phase, "size": size}
        row |= {
            "calls": profiles[0].get(key, (0, 0))[1],
            "milliseconds": ms,
            "floor_milliseconds": 1e3 * least.get(key, 0),
        }
        rows.append(row | {"gap_milliseconds": ms - row["floor_milliseconds"]})
    flops = roofline.step_flops(spec.architecture(), spec.batch_size)
    facts = {
        "workload": workload.name,
        "title": workload.title,
        "implementation": name,
        "rates": rates,
        "step_milliseconds": 1e3 * harness.quantiles([sum(t) for t in times["step"]])[0],
        "profiled_milliseconds": statistics.median(sum(ms for ms, _ in found.values()) for found in profiles),
        "arithmetic_milliseconds": 1e3 * flops / rates["flops"],
    }
    return rows, facts


def markdown(rows, facts):
    cells = []
    for r in sorted(rows, key=lambda r: -r["gap_milliseconds"]):
        size = f"{r['size']}x{r['size']}" if r["size"] else ""
        least = f"{r['floor_milliseconds']:.2f}" if r["floor_milliseconds"] else ""
        times = f"{r['milliseconds'] / r['floor_milliseconds']:.1f}x" if r["floor_milliseconds"] else ""
        found = [least, f"{r['milliseconds']:.2f}", times, f"{r['gap_milliseconds']:.2f}"]
        cells.append([r["phase"], r["part"], size, str(r["calls"]), *found])
    whole = [f"{sum(r[key] for r in rows):.2f}" for key in ("floor_milliseconds", "milliseconds", "gap_milliseconds")]
    cells.append(["all", "", "", "", whole[0], whole[1], "", whole[2]])
    header = ["phase", "part", "maps", "calls", "floor ms", "ms", "of floor", "over it"]
    step, least = facts["step_milliseconds"], facts["arithmetic_milliseconds"]
    return "\n\n".join(
        (
            f"## {facts['title']}, {facts['implementation']}",
            f"Limits measured between the steps: {describe(facts['rates'])}.",
            machine.table(header, cells),
            f"A step without the profiler: {step:.1f} ms, {step / least:.2f} times the {least:.1f} ms that the plain network's "
            "convolutions take at the matrix product's rate.",
        )
    )


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    description = machine.describe("cpu")
    print(machine.heading(description) + "\n", flush=True)
    rows, whole = [], []
    chosen = [(name, implementation) for name in args.workloads for implementation in args.implementations]
    for name, implementation in tqdm(chosen, desc="phases", disable=None):
        workload = workloads.find(name, args.dtype, args.batch_size, args.quick)
        found, facts = measure(workload, implementation, args)
        rows, whole = rows + found, [*whole, facts]
        print(markdown(found, facts) + "\n", flush=True)
    if args.json:
        machine.write_json(args.json, description, rows, steps=whole)
    if args.csv:
        machine.write_csv(args.csv, description, rows)


if __name__ == "__main__":
    main()
