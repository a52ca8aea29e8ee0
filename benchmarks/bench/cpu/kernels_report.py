"""The results of kernels.py as tables, with the reason of every op that comes out below half of its limit."""

from bench.compositions import COMPOSITIONS
from bench.roofline import FORMULAS, rates_text
from bench.tables import Column, listed, paragraphs, table_of

TITLE = "Kernel ops on a CPU"
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
    formulas = listed(f"{op}: {text}; {FORMULAS[op]}" for op, text in COMPOSITIONS.items())
    return paragraphs(*parts, "PyTorch's composition, the faster of two memory formats; bytes:", formulas)
