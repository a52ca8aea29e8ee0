"""Peak memory against depth and against growth rate, with the exponent of a least-squares line in log-log axes.

Plain DenseNets keep every layer's normalised copy of all channels before it: memory grows with the square of the
depth. What the fused stages keep is the feature maps themselves: linear.
"""

from math import log

import harness
import machine
from harness import MB, Spec
from tqdm import tqdm

DEPTHS = (22, 40, 70, 100, 160, 250)
GROWTH_RATES = (8, 12, 16, 24, 32, 48)
IMPLEMENTATIONS = ("plain", "checkpoint", "fused")
DEPTH_OF_GROWTH = 40


def run(args, description):
    """Measures, prints, and writes what `args` ask for."""
    base = {
        "variant": (args.variants or ("A+B",))[-1],
        "batch_size": args.batch_size or 16,
        "size": args.size,
        "dtype": args.dtype,
        "device": args.device,
        "channels_last": args.channels_last,
    }
    implementations = args.implementations or IMPLEMENTATIONS
    sweeps = {
        "depth": [Spec(i, depth=d, growth_rate=args.growth_rate, **base) for i in implementations for d in DEPTHS],
        "growth_rate": [
            Spec(i, depth=DEPTH_OF_GROWTH, growth_rate=k, **base) for i in implementations for k in GROWTH_RATES
        ],
    }
    peaks = {}
    for spec in tqdm(dict.fromkeys(sum(sweeps.values(), [])), desc="peak", disable=None):
        peaks[spec] = harness.measure_memory(harness.TrainingStep(spec)).peak_bytes
    rows, fits = [], []
    print(
        f"Peak MB of a training step, {base['variant']}, batch {base['batch_size']}, {args.size}x{args.size}, {args.dtype}"
    )
    for what, specs in sweeps.items():
        values = DEPTHS if what == "depth" else GROWTH_RATES
        cells = []
        for implementation in implementations:
            found = [peaks[s] for s in specs if s.implementation == implementation]
            fit = {"against": what, "implementation": implementation, "exponent": exponent(values, found)}
            fit["last_step"] = exponent(values[-2:], found[-2:])
            fits.append(fit)
            rows += [fit | {what: v, "peak_bytes": p} for v, p in zip(values, found, strict=True)]
            peak_cells = [f"{p / MB:.0f}" for p in found]
            cells.append([what, implementation, *peak_cells, f"{fit['exponent']:.2f}", f"{fit['last_step']:.2f}"])
        fixed = f"k = {args.growth_rate}" if what == "depth" else f"depth {DEPTH_OF_GROWTH}"
        print("\n" + machine.table([fixed, "implementation", *map(str, values), "exponent", "last two"], cells))
    print(
        "\nexponent: of a least-squares line through all points in log-log axes; last two: between the last two points."
    )
    columns = ["against", "implementation", "depth", "growth_rate", "peak_bytes", "exponent", "last_step"]
    rows = [base | {c: row.get(c, _fixed(c, args)) for c in columns} for row in rows]
    if args.json:
        machine.write_json(args.json, description, rows, fits=fits)
    if args.csv:
        machine.write_csv(args.csv, description, rows)
    if args.plot:
        import plot  # matplotlib, which measuring does without

        plot.plot_scaling(rows, description, args.plot)


def _fixed(column, args):
    return args.growth_rate if column == "growth_rate" else DEPTH_OF_GROWTH


def exponent(x, y):
    """Slope of the least-squares line through (log x, log y)."""
    x, y = [log(v) for v in x], [log(v) for v in y]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
