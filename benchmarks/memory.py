"""Peak memory and time of a training step: plain, torch.utils.checkpoint and fused, for the paper's variants.

    python benchmarks/memory.py                 three minutes or so on two cores
    python benchmarks/memory.py --scaling       peak against depth and growth rate

Before anything is measured, outputs, gradients and running statistics of all implementations are compared.
harness.py says how the figures are taken, resident.py how the growth of the resident set is.
"""

import argparse
import sys
import time
from dataclasses import asdict

import agreement
import harness
import machine
import resident
import scaling
import torch
from harness import MB, Spec
from tqdm import tqdm

# Table 1 of the paper, peak MB on an RTX 3060: DenseNet-BC(100, k=12), batch 64, 32x32.
# Its C is a memory-efficient implementation that recomputes, of the kind of torch.utils.checkpoint's.
PAPER = {("vanilla", "plain"): 1222, ("A+B", "plain"): 1164, ("A+B", "fused"): 505}

# The last variant gets the first list and every round; those before it the second and every other round.
MAIN = ("plain", "plain-channels-last", "checkpoint", "fused", "fused-kept")
OTHERS = ("plain", "checkpoint", "fused")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: the one there is")
    add("--dtype", default="float32", choices=harness.DTYPES, help="half types: autocast")
    add("--batch-size", type=int, help="default 64; 16 with --scaling")
    add("--size", type=int, default=32, help="height and width of the images")
    add("--depth", type=int, default=100, help="6n + 4")
    add("--growth-rate", type=int, default=12)
    add("--channels-last", action="store_true", help="all implementations, not only those named so")
    add(
        "--variants",
        type=machine.names(harness.VARIANTS),
        help="some of vanilla,A,B,A+B; default: all, A+B with --scaling",
    )
    add(
        "--implementations",
        type=machine.names(harness.IMPLEMENTATIONS),
        help="some of " + ",".join(harness.IMPLEMENTATIONS),
    )
    add("--rounds", type=int, default=5, help="interleaved steps of each row")
    add("--time-limit", type=float, default=180, help="seconds after which no round of timing is begun (default 180)")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--keep-pages", action="store_true", help="start anew with a malloc that keeps its pages; may speed plain up")
    add("--no-resident", action="store_true", help="leave out the fresh processes")
    add("--scaling", action="store_true", help="peak against depth and growth rate, with fitted exponents")
    add("--csv", metavar="FILE")
    add("--json", metavar="FILE")
    add("--plot", metavar="FILE", help="a picture of the last variant, or of the scaling")
    return parser.parse_args()


def choose_specs(args):
    """The rows of the table, by variant."""
    variants = args.variants or harness.VARIANTS
    return [
        Spec(
            implementation=implementation,
            variant=variant,
            depth=args.depth,
            growth_rate=args.growth_rate,
            batch_size=args.batch_size or 64,
            size=args.size,
            dtype=args.dtype,
            device=args.device,
            channels_last=args.channels_last,
        )
        for variant in variants
        for implementation in args.implementations or (MAIN if variant == variants[-1] else OTHERS)
        if variant == "vanilla" or not implementation.startswith("torchvision")
    ]


def measure(specs, args, began):
    """Rows, one variant's after the other's, as soon as they are measured: specs and figures in bytes and seconds."""
    variants = list(dict.fromkeys(spec.variant for spec in specs))
    rounds = {v: args.rounds if v == variants[-1] else (args.rounds + 1) // 2 for v in variants}
    planned, begun = sum(rounds[spec.variant] for spec in specs), 0
    with tqdm(total=len(specs), unit="row", disable=None) as progress:
        for variant in variants:
            group = [spec for spec in specs if spec.variant == variant]
            begun += rounds[variant] * len(group)
            deadline = began + args.time_limit * begun / planned
            rows = _measure_variant(group, rounds[variant], variant == variants[-1], args, deadline, progress)
            with tqdm.external_write_mode():
                yield from rows


def _measure_variant(specs, rounds, main, args, deadline, progress):
    steps, memory, grown = {}, {}, {}
    for spec in specs:
        progress.set_description(f"{spec.variant} {spec.implementation}")
        steps[spec] = harness.TrainingStep(spec)
        memory[spec] = harness.measure_memory(steps[spec])
        if main and spec.device == "cpu" and not args.no_resident:
            grown[spec] = resident.resident_growth(spec, args.threads)
    progress.set_description(f"{specs[0].variant} times")
    times = harness.interleave(steps, rounds, deadline)
    rows = []
    for spec in specs:
        median, low, high = harness.quantiles(times[spec])
        row = asdict(spec) | asdict(memory[spec]) | {"resident_bytes": grown.get(spec)}
        row |= {"seconds": median, "seconds_20": low, "seconds_80": high, "rounds": len(times[spec])}
        rows.append(row | {"paper_mb": PAPER.get((spec.variant, spec.implementation)) if _is_papers(spec) else None})
    plain = next((row for row in rows if row["implementation"] == "plain"), None)
    for row in rows:
        row["memory_ratio"] = plain and plain["peak_bytes"] / row["peak_bytes"]
        row["time_ratio"] = plain and plain["seconds"] / row["seconds"]
    progress.update(len(rows))
    return rows


def _is_papers(spec):
    return (spec.depth, spec.growth_rate, spec.batch_size, spec.size, spec.dtype) == (100, 12, 64, 32, "float32")


def header_of(specs):
    """The columns' titles and widths, before there is a row."""
    header = ["variant", "implementation", "peak MB", "less", "kept MB"]
    header += ["reserved MB"] if specs[0].device.startswith("cuda") else ["arena MB", "resident MB"]
    header += ["s a step", "20-80 %", "faster", "paper MB"]
    widths = [max(len(title), 5) for title in header]
    widths[1] = max(len(title) for title in ("implementation", *(spec.implementation for spec in specs)))
    widths[header.index("20-80 %")] = len("10.000-10.000")
    return header, widths


def cells_of(row):
    cuda = row["device"].startswith("cuda")
    whole = [row["reserved_bytes"]] if cuda else [row["workspace_bytes"] or None, row["resident_bytes"]]
    return [
        label(row),
        row["implementation"],
        f"{row['peak_bytes'] / MB:.0f}",
        _optional(row["memory_ratio"], "{:.1f}x"),
        f"{row['kept_bytes'] / MB:.0f}",
        *(_optional(value and value / MB, "{:.0f}") for value in whole),
        f"{row['seconds']:.3f}",
        f"{row['seconds_20']:.3f}-{row['seconds_80']:.3f}",
        _optional(row["time_ratio"], "{:.2f}x"),
        _optional(row["paper_mb"], "{}"),
    ]


def label(row):
    """A+B computed memory-efficiently is what the paper calls A+B+C."""
    return (
        row["variant"] + "+C"
        if row["variant"] == "A+B" and row["implementation"].startswith("fused")
        else row["variant"]
    )


def _optional(value, form):
    return "" if value is None else form.format(value)


def notes(rows):
    lines = [
        "peak: highest level in a training step, over parameters, gradients and momentum; kept: of it, what lives from "
        "forward to backward.",
        "less, faster: against plain, same variant. Times: median and 20-80 % quantiles of interleaved steps: "
        + ", ".join(f"{count} of {variant}" for variant, count in {r["variant"]: r["rounds"] for r in rows}.items()),
    ]
    if any(r["workspace_bytes"] for r in rows):
        lines.append(
            "arena: part of the peak that is the library's own workspaces and not torch's; stays for the next step."
        )
    if any(r["resident_bytes"] for r in rows):
        lines.append("resident: growth of a fresh process in one step, whoever allocates.")
    if any(r["paper_mb"] for r in rows):
        lines.append("paper: its Table 1, an RTX 3060; its C recomputes as checkpoint does.")
    return "\n".join(lines)


def main():
    args = parse_arguments()
    if args.keep_pages:
        machine.restart_with(machine.KEEP_PAGES)
    began = time.monotonic()
    torch.set_num_threads(args.threads)
    description = machine.describe(args.device)
    print(machine.heading(description) + "\n", flush=True)
    if args.scaling:
        return scaling.run(args, description)

    specs = choose_specs(args)
    try:
        agreed = agreement.check(specs)
    except agreement.DisagreementError as error:
        sys.exit(f"The implementations disagree: nothing was measured.\n{error}")
    print(agreement.summary(agreed) + "\n", flush=True)
    first = specs[0]
    print(
        f"DenseNet-BC({first.depth}, k={first.growth_rate}), batch {first.batch_size}, "
        f"{first.size}x{first.size}, {first.dtype}, {args.device}\n"
    )
    header, widths = header_of(specs)
    print("\n".join(machine.table_head(header, widths)), flush=True)
    rows = []
    for row in measure(specs, args, began):
        print(machine.table_row(cells_of(row), widths), flush=True)
        rows.append(row)
    print("\n" + notes(rows))
    if args.json:
        machine.write_json(args.json, description, rows, agreement=[asdict(a) for a in agreed])
    if args.csv:
        machine.write_csv(args.csv, description, rows)
    if args.plot:
        import plot  # matplotlib, which measuring does without

        plot.plot_memory([r for r in rows if r["variant"] == specs[-1].variant], description, args.plot)


if __name__ == "__main__":
    main()
