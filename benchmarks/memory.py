"""Peak memory and time of a training step: plain, torch.utils.checkpoint and fused, for the paper's variants.

    python benchmarks/memory.py                 about four minutes on two cores
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

# the last variant gets the first list and every round; those before it the second and every other round
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
    add("--time-limit", type=float, default=225, help="seconds after which no round of timing is begun (default 225)")
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


def measure(specs, args, deadline):
    """A list of rows: spec and figures in bytes and seconds."""
    main_variant = specs[-1].variant
    with tqdm(specs, desc="memory", disable=None) as progress:
        steps, memory = {}, {}
        for spec in progress:
            steps[spec] = harness.TrainingStep(spec)
            memory[spec] = harness.measure_memory(steps[spec])
    resident_specs = [s for s in specs if s.variant == main_variant and s.device == "cpu" and not args.no_resident]
    grown = {}
    for spec in tqdm(resident_specs, desc="resident set", disable=None):
        grown[spec] = resident.resident_growth(spec, args.threads)
    rounds = {s: args.rounds if s.variant == main_variant else (args.rounds + 1) // 2 for s in specs}
    with tqdm(total=sum(rounds.values()), desc="time", unit="step", disable=None) as progress:
        times = harness.interleave(steps, rounds, deadline, progress)
    rows = []
    for spec in specs:
        median, low, high = harness.quantiles(times[spec])
        row = asdict(spec) | asdict(memory[spec]) | {"resident_bytes": grown.get(spec)}
        row |= {"seconds": median, "seconds_20": low, "seconds_80": high, "rounds": len(times[spec])}
        rows.append(row | {"paper_mb": PAPER.get((spec.variant, spec.implementation)) if _is_papers(spec) else None})
    for row in rows:
        plain = next((r for r in rows if r["variant"] == row["variant"] and r["implementation"] == "plain"), None)
        row["memory_ratio"] = plain and plain["peak_bytes"] / row["peak_bytes"]
        row["time_ratio"] = plain and plain["seconds"] / row["seconds"]
    return rows


def _is_papers(spec):
    return (spec.depth, spec.growth_rate, spec.batch_size, spec.size, spec.dtype) == (100, 12, 64, 32, "float32")


def format_rows(rows):
    cuda = rows[0]["device"].startswith("cuda")
    header = ["variant", "implementation", "peak MB", "less", "kept MB"]
    header += ["reserved MB"] if cuda else ["arena MB", "resident MB"]
    header += ["s a step", "20-80 %", "faster", "paper MB"]
    cells = []
    for r in rows:
        whole = [r["reserved_bytes"]] if cuda else [r["workspace_bytes"] or None, r["resident_bytes"]]
        cells.append(
            [
                label(r),
                r["implementation"],
                f"{r['peak_bytes'] / MB:.0f}",
                _optional(r["memory_ratio"], "{:.1f}x"),
                f"{r['kept_bytes'] / MB:.0f}",
                *(_optional(value and value / MB, "{:.0f}") for value in whole),
                f"{r['seconds']:.3f}",
                f"{r['seconds_20']:.3f}-{r['seconds_80']:.3f}",
                _optional(r["time_ratio"], "{:.2f}x"),
                _optional(r["paper_mb"], "{}"),
            ]
        )
    return machine.table(header, cells)


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
    deadline = time.monotonic() + args.time_limit
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
    rows = measure(specs, args, deadline)
    first = specs[0]
    print(
        f"DenseNet-BC({first.depth}, k={first.growth_rate}), batch {first.batch_size}, "
        f"{first.size}x{first.size}, {first.dtype}, {args.device}\n"
    )
    print(format_rows(rows) + "\n\n" + notes(rows))
    if args.json:
        machine.write_json(args.json, description, rows, agreement=[asdict(a) for a in agreed])
    if args.csv:
        machine.write_csv(args.csv, description, rows)
    if args.plot:
        import plot  # matplotlib, which measuring does without

        plot.plot_memory([r for r in rows if r["variant"] == specs[-1].variant], description, args.plot)


if __name__ == "__main__":
    main()
