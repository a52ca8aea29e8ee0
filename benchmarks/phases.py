"""The budget of one fused training step on a CPU: milliseconds by phase, measured inside a real step, beside their floors.

    python benchmarks/phases.py --workloads cifar --implementations fused,fused-kept

A phase is all calls of one kernel op on maps of one size, the stem, the classifier with the loss, the optimizer, or what is
left. Its floor is the longer of its bytes at a copy's rate and its operations at a large matrix product's, both rates
measured between the steps. Operations are counted as the fused network does them, so that their sum is less than the plain
network's. The profiler's own time is in the phases: the unprofiled step stands below.
"""

import statistics
from collections import Counter, defaultdict

from bench import environment, options, results, roofline, workloads
from bench.implementations import EAGER
from bench.machine_rates import RateSamples
from bench.roofline import STORAGE_BYTES, floor, op_bytes, op_flops, rates_text, step_ops
from bench.steps import new_step
from bench.tables import Column, paragraphs, table_of
from bench.timing import interleave
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

TITLE = "Phases of a training step"
PARTS = ("forward", "backward", "optimizer")
STAGE = "stages, outside of kernels"
FUSED = ("dense_stage", "dense_tail", "dense_block", "new_gradients", "dense_stem")
FUSED += ("DenseStage", "DenseTail", "DenseBlock")
# Phases by words in the names of torch's operators and of autograd's nodes; the first that fits.
OTHERS = {
    "gradients handed over": ("AccumulateGrad",),
    "running statistics": ("_foreach", "select", "split", "aten::mul"),
    "classifier and loss": ("linear", "cross_entropy", "Nll", "LogSoftmax", "Addmm", "TBackward", "ones_like"),
    "stem": ("conv", "Conv", "batch_norm", "BatchNorm", "relu", "Relu", "pool", "Pool", "add_"),
}


def parse_arguments(arguments=None):
    parser = options.new_parser(__doc__)
    add = parser.add_argument
    fused = [name for name in EAGER if name.startswith("fused")]
    add("--workloads", type=options.names(workloads.TRAINING), default=("cifar",), help=",".join(workloads.TRAINING))
    add("--implementations", type=options.names(fused), default=("fused", "fused-kept"), help=",".join(fused))
    add("--batch-size", type=int)
    add("--rounds", type=int, default=7)
    environment.add_threads(parser)
    options.add_quick(parser)
    options.add_outputs(parser)
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
    found, events = defaultdict(lambda: [0.0, 0]), recorded.events()

    def count(microseconds, *key, calls=1):
        found[key][0] += microseconds / 1e3
        found[key][1] += calls

    for part in PARTS:
        root = next(e for e in events if e.name == f"phase: {part}")
        count(root.cpu_time_total - sum(e.cpu_time_total for e in root.cpu_children), part, "rest", 0, calls=0)
        for event in root.cpu_children:
            if not any(op in event.name for op in FUSED):
                count(event.cpu_time_total, part, _phase(part, event.name), 0)
                continue
            kernels = list(_kernels(event))
            for kernel in kernels:
                count(kernel.cpu_time_total, part, kernel.name.split("::")[1], _side(kernel, step.spec))
            count(event.cpu_time_total - sum(k.cpu_time_total for k in kernels), part, STAGE, 0)
    return dict(found)


def _kernels(event):
    """Kernel ops below an event, at whatever depth."""
    for child in event.cpu_children:
        if child.name.startswith("densenet_ext::") and not any(op in child.name for op in FUSED):
            yield child
        else:
            yield from _kernels(child)


def _side(kernel, spec):
    """Height of the largest maps among its arguments; tables and weights of 3x3 or 1x1 are none."""
    maps = [s for s in kernel.input_shapes if len(s) == 4 and s[0] == spec.batch_size and s[2] == s[3]]
    return max((s[2] for s in maps if s[2] not in (1, 3)), default=0)


def _phase(part, name):
    if part == "optimizer":
        return "optimizer"
    return next((phase for phase, words in OTHERS.items() if any(w in name for w in words)), "rest")


def floors(spec, keep_bottleneck, rates):
    """{(part, phase, size): seconds} that no version takes less than."""
    found, e = defaultdict(float), STORAGE_BYTES[spec.dtype]
    forward = Counter(step_ops(spec, keep_bottleneck, training=False))
    backward = Counter(step_ops(spec, keep_bottleneck)) - forward
    # forward and backward of the first convolution move as much
    stem = floor(roofline.stem_bytes(spec, training=False), roofline.stem_flops(spec), rates)[0]
    for part, ops in (("forward", forward), ("backward", backward)):
        found[part, "stem", 0] = stem
        for op, size in ops.elements():
            found[part, op, size.height] += floor(op_bytes(op, size, e), op_flops(op, size), rates)[0]
    found["optimizer", "optimizer", 0] = roofline.optimizer_bytes(spec) / rates["bytes"]
    return found


def measure(workload, implementation, rounds, tiny=False):
    """Rows by phase, and facts of the whole step."""
    step = new_step(workload, implementation)
    step.first = None
    kept = step.spec.traits.network == "fused-kept"
    step.model.keep_bottleneck = kept  # not 'auto': the floors are those of all bottlenecks or of none
    machine, profiles = RateSamples(workload.spec.dtype, tiny), []
    samples = {"step": step.timed, "profile": lambda: profiles.append(profiled(step))} | machine.samples
    profiled(step)  # the first is slow
    times = interleave(samples, rounds)
    rates, spec = machine.rates(times), step.spec
    least = floors(spec, kept, rates)
    rows = []
    for key in dict.fromkeys(key for found in profiles for key in found):
        part, phase, size = key
        ms, limit = statistics.median(found.get(key, (0.0, 0))[0] for found in profiles), 1e3 * least.get(key, 0)
        row = {"workload": workload.name, "implementation": implementation, "part": part, "phase": phase, "size": size}
        row |= {"calls": profiles[0].get(key, (0, 0))[1], "milliseconds": ms, "floor_milliseconds": limit}
        rows.append(row | {"gap_milliseconds": ms - limit})
    flops = roofline.step_flops(spec)
    facts = {
        "workload": workload.name,
        "title": workload.title,
        "implementation": implementation,
        "rates": rates,
        "step_milliseconds": 1e3 * statistics.median(sum(t) for t in times["step"]),
        "profiled_milliseconds": statistics.median(sum(ms for ms, _ in found.values()) for found in profiles),
        "arithmetic_milliseconds": 1e3 * flops / rates["flops"],
    }
    return rows, facts


def body(results):
    return paragraphs(*(step_text(results["rows"], facts) for facts in results["steps"]))


def step_text(rows, facts):
    """The table of one step, the phases with the largest gap first."""
    keys = ("workload", "implementation")
    rows = [row for row in rows if all(row[key] == facts[key] for key in keys)]
    sums = {key: sum(row[key] for row in rows) for key in ("floor_milliseconds", "milliseconds", "gap_milliseconds")}
    columns = [
        Column("phase", "phase"),
        Column("part", "part"),
        Column("maps", lambda r: f"{r['size']}x{r['size']}" if r.get("size") else None),
        Column("calls", "calls"),
        Column("floor ms", lambda r: r["floor_milliseconds"] or None, "{:.2f}"),
        Column("ms", "milliseconds", "{:.2f}"),
        Column("of floor", _of_floor, "{:.1f}x"),
        Column("over it", "gap_milliseconds", "{:.2f}"),
    ]
    step, least = facts["step_milliseconds"], facts["arithmetic_milliseconds"]
    return paragraphs(
        f"## {facts['title']}, {facts['implementation']}",
        f"Limits measured between the steps: {rates_text(facts['rates'])}.",
        table_of(columns, [*sorted(rows, key=lambda row: -row["gap_milliseconds"]), {"phase": "all", **sums}]),
        f"A step without the profiler: {step:.1f} ms, {step / least:.2f} times the {least:.1f} ms that the plain network's "
        "convolutions take at the matrix product's rate.",
    )


def _of_floor(row):
    """Times its floor; nothing for the sum of all phases, of which some have none."""
    return row["milliseconds"] / row["floor_milliseconds"] if row["floor_milliseconds"] and "part" in row else None


def main():
    args = parse_arguments()
    measured = {"benchmark": "phases", "machine": environment.begin(args.threads), "steps": [], "rows": []}
    chosen = [(name, implementation) for name in args.workloads for implementation in args.implementations]
    for name, implementation in tqdm(chosen, desc="phases", disable=None):
        workload = workloads.find(name, args.dtype, args.batch_size, args.quick)
        rows, facts = measure(workload, implementation, args.rounds, args.quick)
        measured["rows"] += rows
        measured["steps"].append(facts)
        print(step_text(rows, facts) + "\n", flush=True)
    results.write(args, measured)


if __name__ == "__main__":
    main()
