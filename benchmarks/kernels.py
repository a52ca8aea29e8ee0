"""Time of every kernel op on a CPU beside the composition of PyTorch's operators that it replaces, and its limit.

    python benchmarks/kernels.py                the layers of three networks, and odd sizes beside even ones

The composition (bench/compositions.py) is timed in both memory formats and the faster one counts. All ops of a size are timed
in turn, with a large matrix product and a copy between them: a limit is the longer of the op's bytes at the copy's rate
and its operations at the product's (bench/roofline.py). GB/s are of those bytes, so what fits the caches can exceed the
copy's. Tensors of all of them are in pages of 2 MB where the system has such, as the library's workspaces are, and a call
that is timed follows one that is not: in a step, too, threads are awake. An op that comes out below half of its limit has its
reason below the table.
"""

import gc
import time
from functools import partial
from statistics import median

import torch
from bench import environment, options, results
from bench.compositions import COMPOSITIONS, Composition
from bench.kernel_arguments import bind
from bench.kernel_cases import NETS, PAIRS, cpu_cases
from bench.machine_rates import RateSamples
from bench.roofline import FORMULAS, STORAGE_BYTES, floor, op_bytes, op_flops, rates_text
from bench.tables import Column, first_line, listed, paragraphs, table_of
from bench.timing import interleave, quantile_row, wall_seconds
from tqdm import tqdm

TITLE = "Kernel ops on a CPU"
FORMATS = ("contiguous", "channels last")
ODD_LIMIT = 1.5  # times an even size's seconds an operation
HALF = 0.5  # of the limit: an op below it wants a reason
REASONS = {
    "fold_norm": "a few kilobytes: the time is that of calling an operator.",
    "squeeze_excite_forward": "small maps: two tiny matrix products wait for each other.",
    "squeeze_excite_backward": "as its forward.",
    "append": "small maps: waking the second thread costs as much as the copy.",
    "finish_gradient": "small maps: waking the second thread costs as much as the work.",
    "head_forward": "a few megabytes: starting the threads is a good part of the time.",
    "head_backward": "as its forward.",
    "stem_forward": "nine comparisons an output, and moments in the same pass: not the bytes alone.",
    "stem_backward": "maxima are sought again in one pass, and dx is written from them in another.",
    "transition_forward": "normalizing and pooling the channels of a tile comes before its product and does not overlap "
    "with it: the time is the sum of both. The product, of a quarter of the pixels, is on FMA units.",
    "transition_backward": "as its forward, with two products.",
    "bottleneck_forward": "few channels: a store reads the line of b first, up to 1.7 times the bytes that are counted. More, "
    "with AMX: forming z takes as long as its six products, and overlaps with them in part. Small maps: splitting W.",
    "bottleneck_backward": "db is formed and split twice, as the operand of either product: few channels leave little to do "
    "with it. Small maps: splitting W, merging the threads' dW.",
    "conv3x3_forward": "with AMX, width 48 fills nine tenths of its chunks of 32, growth 12 three quarters of a tile, 8x8 "
    "pixels four fifths of their padded plane: half to two thirds of the products count, of growth 5 a quarter. Small maps: "
    "splitting W.",
    "conv3x3_backward": "with AMX, shifted copies of dy are made for both products, and that overlaps with them in part. "
    "Small maps: padding, splitting W, merging the threads' dW.",
}


def parse_arguments(arguments=None):
    parser = options.new_parser(__doc__)
    add = parser.add_argument
    add("--ops", type=options.names(FORMULAS), default=tuple(FORMULAS), help="some of " + ",".join(FORMULAS))
    add("--nets", type=options.names(NETS), default=NETS, help=",".join(NETS))
    add("--rounds", type=int, default=9)
    add("--time-limit", type=float, default=900, help="seconds after which no size is begun")
    environment.add_threads(parser)
    options.add_quick(parser)
    options.add_outputs(parser)
    return parser.parse_args(arguments)


def measure(cases, args, deadline):
    """A row for each op of each case; the sizes that were not begun in time have rows that say so."""
    rows = []
    for case in tqdm(cases, desc="kernels", disable=None):
        s, ops = case.size, [op for op in case.ops if op in args.ops]
        if not ops:
            continue
        late = time.monotonic() > deadline
        figures = dict.fromkeys(ops, {"error": "out of time"}) if late else measure_case(s, ops, args)
        for op in ops:
            row = {"op": op, "net": case.net, "case": case.name, "dtype": args.dtype, "samples": s.samples}
            row |= {"height": s.height, "width": s.width, "channels": s.channels, "bottleneck": s.bottleneck}
            rows.append(row | {"growth": s.growth} | figures[op])
        gc.collect()
    return rows


def measure_case(size, ops, args):
    """Figures of each op; of one that fails, how it does."""
    storage, samples, errors = getattr(torch, args.dtype), {}, {}
    for op in ops:
        try:
            functions = {"ours": bind(op, size, storage, "cpu")}
            functions |= {c: Composition(size, storage, c == "channels last").function(op) for c in FORMATS}
            for function in functions.values():
                function()
        except (RuntimeError, TypeError, ValueError) as error:
            errors[op] = {"error": first_line(error)}
            continue
        samples |= {(op, which): partial(_second_call, function) for which, function in functions.items()}
    machine = RateSamples(args.dtype, args.quick)
    times = interleave(samples | machine.samples, args.rounds)
    rates = machine.rates(times)
    return {op: errors.get(op) or _figures(op, size, args.dtype, times, rates) for op in ops}


def _second_call(function):
    function()
    return wall_seconds(function)


def _figures(op, size, dtype, times, rates):
    row = quantile_row(times[op, "ours"])
    seconds = row["seconds"]
    composed = {c: median(times[op, c]) for c in FORMATS}
    best = min(composed, key=composed.get)
    moved, flops = op_bytes(op, size, STORAGE_BYTES[dtype]), op_flops(op, size)
    limit, bound = floor(moved, flops, rates)
    return row | {
        "composition_seconds": composed[best],
        "composition_format": best,
        "faster": composed[best] / seconds,
        "bytes": moved,
        "flops": flops,
        "gbytes_per_second": moved / seconds / 1e9,
        "gflops_per_second": flops / seconds / 1e9,
        "limit_seconds": limit,
        "of_limit": limit / seconds,
        "bound": bound,
        "matrix_rate": rates["flops"],
        "copy_rate": rates["bytes"],
    }


def odd_ratios(rows):
    """For each of PAIRS that was measured: times the even size's seconds an operation, layer by layer."""
    found = []
    for pair, sizes in PAIRS.items():
        odd, even = ([_an_operation(rows, size, key) for key in ("seconds", "limit_seconds")] for size in sizes)
        if all(odd) and all(even):
            ratios = {"ratio": odd[0] / even[0], "ratio_of_limits": odd[1] / even[1]}
            found.append({"pair": pair, **ratios, "limit": ODD_LIMIT})
    return found


def _an_operation(rows, size, key):
    names = ("height", "width", "channels", "growth")
    chosen = [r for r in rows if r["net"] == "odd" and all(r[name] == getattr(size, name) for name in names)]
    flops = sum(row.get("flops", 0) for row in chosen)
    return sum(row.get(key, 0) for row in chosen) / flops if flops else None


COLUMNS = [
    Column("op", "op"),
    Column("size", "case"),
    Column("ms", "seconds", "{:.3f}", 1e3),
    Column("PyTorch ms", "composition_seconds", "{:.3f}", 1e3),
    Column("faster", "faster", "{:.1f}x"),
    Column("GB/s", "gbytes_per_second", "{:.1f}"),
    Column("GFLOP/s", lambda row: row["gflops_per_second"] or None, "{:.0f}"),
    Column("bound by", "bound"),
    Column("of the limit", "of_limit", "{:.0f} %", 100),
    Column("", lambda row: "below half" if row["of_limit"] < HALF else None),
]
ODD_COLUMNS = [
    Column("sizes", "pair"),
    Column("wanted", "limit", "<= {}"),
    Column("found", "ratio", "{:.2f}"),
    Column("limits", "ratio_of_limits", "{:.2f}"),
]


def body(results):
    """The machine's best rates, the table of ops, that of odd sizes, and the reasons."""
    rows = results["rows"]
    parts = []
    if measured := [row for row in rows if "error" not in row]:
        best = {"flops": max(r["matrix_rate"] for r in measured), "bytes": max(r["copy_rate"] for r in measured)}
        parts.append(f"The machine at its best: {rates_text(best)}.")
    parts.append(table_of(COLUMNS, rows, lambda row: [row["op"], row["case"], "failed"] if "error" in row else None))
    parts.append(listed(f"{row['op']} {row['case']}: {row['error']}" for row in rows if "error" in row))
    if results["odd"]:
        parts += [
            "Seconds an operation of a layer, times the even size's; at their limits they would have the last:",
            table_of(ODD_COLUMNS, results["odd"]),
        ]
    if below := sorted({row["op"] for row in measured if row["of_limit"] < HALF}):
        parts += ["Why an op is below half of its limit:", listed(f"{op}: {REASONS[op]}" for op in below)]
    formulas = listed(f"{op}: {COMPOSITIONS[op]}; {formula}" for op, formula in FORMULAS.items())
    return paragraphs(*parts, "PyTorch's composition, the faster of two memory formats; bytes:", formulas)


def main():
    args = parse_arguments()
    environment.restart_with(environment.HUGE_PAGES)
    description = environment.begin(args.threads)
    cases = [case for case in cpu_cases(args.quick) if case.net in args.nets]
    rows = measure(cases, args, time.monotonic() + args.time_limit)
    results.publish(args, {"benchmark": "kernels", "machine": description, "odd": odd_ratios(rows), "rows": rows})


if __name__ == "__main__":
    main()
