"""Time of every kernel op on a CPU beside the composition of PyTorch's operators that it replaces, and its limit.

    python benchmarks/kernels.py                the layers of three networks, and odd sizes beside even ones

The composition (compositions.py) is timed in both memory formats and the faster one counts. All ops of a size are timed
in turn, with a large matrix product and a copy between them: a limit is the longer of the op's bytes at the copy's rate
and its operations at the product's (roofline.py). GB/s are of those bytes, so what fits the caches can exceed the copy's.
Tensors of all of them are in pages of 2 MB where the system has such, as the library's workspaces are, and a call that is
timed follows one that is not: in a step, too, threads are awake. What comes out below half of its limit has its reason
below the table.
"""

import argparse
import gc
import time

import harness
import machine
import torch
from compositions import COMPOSITIONS, Composition
from gpu_kernels import EXCITE, HEAD, LAYER, STEM, TRANSITION, Arguments, Case, layer_cases
from limits import Limits, describe, floor
from roofline import FORMULAS, STORAGE_BYTES, Size, op_bytes, op_flops
from tqdm import tqdm

HALF = 0.5  # of the limit: an op below it wants a reason
ODD_LIMIT = 1.5  # times an even size's seconds an operation
# (odd, even, samples, height and width of each, channels, growth of each): what is held against what
PAIRS = (
    ("33x31", "32x32", 16, (33, 31), (32, 32), 120, 12, 12),
    ("14x14", "16x16", 64, (14, 14), (16, 16), 120, 12, 12),
    ("7x7", "8x8", 64, (7, 7), (8, 8), 120, 12, 12),
    ("growth 5", "growth 8", 16, (32, 32), (32, 32), 120, 5, 8),
    ("growth 40", "growth 32", 16, (32, 32), (32, 32), 120, 40, 32),
)


# Why an op may come out below half of its limit.
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ops", type=machine.names(FORMULAS), default=tuple(FORMULAS), help="some of " + ",".join(FORMULAS))
    add("--nets", type=machine.names(NETS), default=NETS, help=",".join(NETS))
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--rounds", type=int, default=9)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--time-limit", type=float, default=900, help="seconds after which no size is begun")
    add("--quick", action="store_true", help="tiny sizes: no figure means anything")
    add("--json", metavar="FILE")
    add("--csv", metavar="FILE")
    return parser.parse_args(arguments)


NETS = ("cifar", "densenet121", "bc190", "odd")


def choose_cases(tiny=False):
    if tiny:
        return [
            *layer_cases("cifar", 2, 8, 24, (8, 20), 16, 4, excite=EXCITE, consumer=TRANSITION, outputs=12),
            *layer_cases("densenet121", 2, 4, 40, (32,), 32, 8, consumer=HEAD),
            Case("densenet121", Size(2, 8, 8, 16), STEM),
            *odd_cases(tiny),
        ]
    cifar, imagenet = {"width": 48, "growth": 12}, {"width": 128, "growth": 32}
    wide = {"width": 160, "growth": 40}
    return [
        *layer_cases("cifar", 64, 32, 216, (24, 120, 204), **cifar, excite=EXCITE, consumer=TRANSITION, outputs=108),
        *layer_cases("cifar", 64, 16, 300, (204,), **cifar, consumer=TRANSITION, outputs=150),
        *layer_cases("cifar", 64, 8, 342, (246,), **cifar, consumer=HEAD),
        Case("densenet121", Size(8, 112, 112, 64), STEM),
        *layer_cases("densenet121", 8, 56, 256, (64, 128, 224), **imagenet, consumer=TRANSITION, outputs=128),
        *layer_cases("densenet121", 8, 28, 512, (320,), **imagenet, consumer=TRANSITION, outputs=256),
        *layer_cases("densenet121", 8, 14, 1024, (640,), **imagenet, consumer=TRANSITION, outputs=512),
        *layer_cases("densenet121", 8, 7, 1024, (768,), **imagenet, consumer=HEAD),
        *layer_cases("bc190", 8, 32, 1320, (80, 680, 1280), **wide, consumer=TRANSITION, outputs=660),
        *layer_cases("bc190", 8, 16, 1900, (1260,), **wide, consumer=TRANSITION, outputs=950),
        *layer_cases("bc190", 8, 8, 2190, (1550,), **wide, consumer=HEAD),
        *odd_cases(),
    ]


def odd_cases(tiny=False):
    """The layers of PAIRS, each size once."""
    cases = {}
    for _, _, samples, odd, even, channels, *growths in PAIRS[2:3] if tiny else PAIRS:
        for (height, width), growth in zip((odd, even), growths, strict=True):
            size = Size(2 if tiny else samples, height, width, channels, 4 * growth, growth, total=channels + growth)
            cases[size] = Case("odd", size, (*LAYER,))
    return list(cases.values())


def measure(cases, args, deadline):
    rows = []
    with tqdm(cases, desc="kernels", disable=None) as progress:
        for case in progress:
            ops = [op for op in case.ops if op in args.ops]
            if time.monotonic() > deadline:
                rows += [cell(case, op, args) | {"error": "out of time"} for op in ops]
            elif ops:
                rows += measure_case(case, ops, args)
            gc.collect()
    return rows


def cell(case, op, args):
    s = case.size
    name = f"{case.name} k{s.growth}" if case.net == "odd" else case.name
    row = {"op": op, "net": case.net, "case": name, "dtype": args.dtype, "samples": s.samples, "height": s.height}
    return row | {"width": s.width, "channels": s.channels, "bottleneck": s.bottleneck, "growth": s.growth}


def measure_case(case, ops, args):
    """A row for each op; one that fails says how."""
    dtype, samples, errors = getattr(torch, args.dtype), {}, {}
    for op in ops:
        try:
            chosen = {"ours": kernel(op, case.size, dtype)}
            chosen |= {c: Composition(case.size, dtype, c == "channels last").function(op) for c in FORMATS}
            for function in chosen.values():
                function()
        except (RuntimeError, TypeError, ValueError) as error:
            errors[op] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
            continue
        samples |= {(op, which): function for which, function in chosen.items()}
    limits = Limits(args.dtype, args.quick)
    timed = {key: lambda f=function: second_call_seconds(f) for key, function in samples.items()}
    times = harness.interleave(timed | limits.samples(), args.rounds, seconds=lambda sample: sample())
    rates = limits.rates(times)
    rows = []
    for op in ops:
        found = {"error": errors[op]} if op in errors else figures(op, case.size, args.dtype, times, rates)
        rows.append(cell(case, op, args) | found)
    return rows


def second_call_seconds(function):
    function()
    return harness.wall_seconds(function)


FORMATS = ("contiguous", "channels last")


def kernel(op, size, dtype):
    function, arguments = getattr(torch.ops.densenet_ext, op).default, getattr(Arguments(size, dtype, "cpu"), op)()
    return lambda: function(*arguments)


def figures(op, size, dtype, times, rates):
    seconds, low, high = harness.quantiles(times[op, "ours"])
    composed = {c: harness.quantiles(times[op, c])[0] for c in FORMATS}
    best = min(composed, key=composed.get)
    moved, flops = op_bytes(op, size, STORAGE_BYTES[dtype]), op_flops(op, size)
    limit = floor(moved, flops, rates)
    return {
        "seconds": seconds,
        "seconds_20": low,
        "seconds_80": high,
        "composition_seconds": composed[best],
        "composition_format": best,
        "faster": composed[best] / seconds,
        "bytes": moved,
        "flops": flops,
        "gbytes_per_second": moved / seconds / 1e9,
        "gflops_per_second": flops / seconds / 1e9,
        "limit_seconds": limit,
        "of_limit": limit / seconds,
        "bound": "bytes" if moved / rates["bytes"] >= flops / rates["flops"] else "operations",
        "matrix_rate": rates["flops"],
        "copy_rate": rates["bytes"],
    }


def odd_ratios(rows):
    """(pair, times the even size's seconds an operation, layer by layer) of PAIRS that were measured."""
    found = []
    for odd, even, _, odd_size, even_size, channels, *growths in PAIRS:
        rate = [
            _seconds_an_operation(rows, s, channels, g) for s, g in zip((odd_size, even_size), growths, strict=True)
        ]
        if all(rate):
            limits = [
                _seconds_an_operation(rows, s, channels, g, "limit_seconds")
                for s, g in zip((odd_size, even_size), growths, strict=True)
            ]
            ratios = {"ratio": rate[0] / rate[1], "ratio_of_limits": limits[0] / limits[1]}
            found.append({"pair": f"{odd} against {even}", **ratios, "limit": ODD_LIMIT})
    return found


def _seconds_an_operation(rows, size, channels, growth, seconds="seconds"):
    chosen = [
        r
        for r in rows
        if r["net"] == "odd"
        and (r["height"], r["width"]) == size
        and (r["channels"], r["growth"]) == (channels, growth)
    ]
    flops = sum(r.get("flops", 0) for r in chosen)
    return sum(r.get(seconds, 0) for r in chosen) / flops if flops else None


def markdown(rows, ratios):
    cells = []
    for r in rows:
        if "error" in r:
            cells.append([r["op"], r["case"], "failed", *[""] * 7])
            continue
        ours, composed = (f"{1e3 * r[key]:.3f}" for key in ("seconds", "composition_seconds"))
        line = [r["op"], r["case"], ours, composed, f"{r['faster']:.1f}x", f"{r['gbytes_per_second']:.1f}"]
        line += [f"{r['gflops_per_second']:.0f}" if r["flops"] else "", r["bound"], f"{100 * r['of_limit']:.0f} %"]
        cells.append([*line, "below half" if r["of_limit"] < HALF else ""])
    header = ["op", "size", "ms", "PyTorch ms", "faster", "GB/s", "GFLOP/s", "bound by", "of the limit", ""]
    parts = [machine.table(header, cells)]
    parts += ["\n".join(f"- {r['op']} {r['case']}: {r['error']}" for r in rows if "error" in r)]
    if ratios:
        lines = [[r["pair"], f"<= {r['limit']}", f"{r['ratio']:.2f}", f"{r['ratio_of_limits']:.2f}"] for r in ratios]
        parts.append(
            "Seconds an operation of a layer, times the even size's; at their limits they would have the last:"
        )
        parts.append(machine.table(["sizes", "wanted", "found", "limits"], lines))
    if below := sorted({r["op"] for r in rows if r.get("of_limit", HALF) < HALF}):
        parts.append("Why an op is below half of its limit:")
        parts.append("\n".join(f"- {op}: {REASONS[op]}" for op in below))
    parts.append("PyTorch's composition, the faster of two memory formats; bytes:")
    parts.append("\n".join(f"- {op}: {text}; {FORMULAS[op]}" for op, text in COMPOSITIONS.items()))
    return "\n\n".join(part for part in parts if part)


def main():
    args = parse_arguments()
    machine.restart_with(machine.HUGE_PAGES)
    torch.set_num_threads(args.threads)
    description = machine.describe("cpu")
    print(machine.heading(description) + "\n", flush=True)
    cases = [case for case in choose_cases(args.quick) if case.net in args.nets]
    rows = measure(cases, args, time.monotonic() + args.time_limit)
    ratios = odd_ratios(rows)
    measured = [r for r in rows if "error" not in r]
    if measured:
        best = {"flops": max(r["matrix_rate"] for r in measured), "bytes": max(r["copy_rate"] for r in measured)}
        print(f"The machine at its best: {describe(best)}.\n")
    print(markdown(rows, ratios))
    if args.json:
        machine.write_json(args.json, description, rows, odd=ratios)
    if args.csv:
        columns = dict.fromkeys(key for row in rows for key in row)
        machine.write_csv(args.csv, description, [{key: row.get(key) for key in columns} for row in rows])


if __name__ == "__main__":
    main()
