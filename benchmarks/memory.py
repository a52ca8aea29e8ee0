"""Peak memory and time of a training step: plain, torch.utils.checkpoint and fused, for the paper's variants.

    python benchmarks/memory.py                 three minutes or so on two cores
    python benchmarks/memory.py --scaling       peak against depth and growth rate
    python benchmarks/memory.py --model torchvision:densenet121 --input 8x3x224x224
                                                any model before and after densenet_ext.convert

Before anything is measured, outputs, gradients and running statistics of all implementations are compared
(bench/agreement.py). bench/memory_meter.py and bench/timing.py say how the figures are taken.
"""

import sys
import time
from dataclasses import asdict
from functools import partial

from bench import agreement, environment, memory_report, options, own_model, results, scaling, timing
from bench.implementations import EAGER
from bench.memory_meter import measure_memory, resident_growth
from bench.networks import VARIANTS, Spec
from bench.steps import TrainingStep
from tqdm import tqdm

# Table 1 of the paper, peak MB on an RTX 3060: DenseNet-BC(100, k=12), batch 64, 32x32.
# Its C is a memory-efficient implementation that recomputes, of the kind of torch.utils.checkpoint's.
PAPER = {("vanilla", "plain"): 1222, ("A+B", "plain"): 1164, ("A+B", "fused"): 505}
PAPER_NETWORK = {"depth": 100, "growth_rate": 12, "batch_size": 64, "size": 32, "dtype": "float32"}

# The last variant gets the first list and every round; the other variants the second and every other round.
MAIN = ("plain", "plain-channels-last", "checkpoint", "fused", "fused-kept")
OTHERS = ("plain", "checkpoint", "fused")


def parse_arguments(arguments=None):
    parser = options.new_parser(__doc__)
    add = parser.add_argument
    environment.add_device(parser)
    add("--dtype", default="float32", choices=options.DTYPES, help="half types: autocast")
    add("--batch-size", type=int, help="default 64; 16 with --scaling")
    add("--size", type=int, default=32, help="height and width of the images")
    add("--depth", type=int, default=100, help="6n + 4")
    add("--growth-rate", type=int, default=12)
    add("--channels-last", action="store_true", help="all implementations, not only those named so")
    add("--variants", type=options.names(VARIANTS), help="some of vanilla,A,B,A+B; default: all, A+B with --scaling")
    add("--implementations", type=options.names(EAGER), help="some of " + ",".join(EAGER))
    add("--rounds", type=int, default=5, help="interleaved steps of each row")
    add("--time-limit", type=float, default=180, help="seconds after which no round of timing is begun (default 180)")
    environment.add_threads(parser)
    add("--keep-pages", action="store_true", help="start anew with a malloc that keeps its pages; may speed plain up")
    add("--no-resident", action="store_true", help="leave out the fresh processes")
    add("--scaling", action="store_true", help="peak against depth and growth rate, with fitted exponents")
    add("--model", help="torchvision:NAME, timm:NAME, monai:NAME or path/to/file.py:function: that model, converted")
    add("--input", type=options.size, default=(8, 3, 224, 224), help="of --model, default 8x3x224x224")
    options.add_outputs(parser, "a picture of the last variant, or of the scaling")
    return parser.parse_args(arguments)


def choose_specs(args, common):
    """The rows of the table, by variant. `common`: the fields that all specs of a command line share."""
    variants = args.variants or VARIANTS
    common = common | {"depth": args.depth, "growth_rate": args.growth_rate, "batch_size": args.batch_size or 64}
    return [
        Spec(implementation, variant, **common)
        for variant in variants
        for implementation in args.implementations or (MAIN if variant == variants[-1] else OTHERS)
        if variant == "vanilla" or not implementation.startswith("torchvision")
    ]


def measure(specs, args, began):
    """Check and measure; print the rows of each variant as soon as they are measured. Returns the results."""
    try:
        agreed = agreement.check(specs)
    except agreement.DisagreementError as error:
        sys.exit(f"The implementations disagree: nothing was measured.\n{error}")
    names, last, rows, begun = [spec.implementation for spec in specs], specs[-1].variant, [], 0
    print(memory_report.introduction(asdict(specs[0]), agreed) + "\n")
    print(memory_report.table([], args.device, names), flush=True)
    rounds = {spec.variant: args.rounds if spec.variant == last else (args.rounds + 1) // 2 for spec in specs}
    planned = sum(rounds[spec.variant] for spec in specs)
    with tqdm(total=len(specs), unit="row", disable=None) as progress:
        for variant in rounds:
            group = [spec for spec in specs if spec.variant == variant]
            begun += rounds[variant] * len(group)
            deadline = began + args.time_limit * begun / planned
            measured = measure_variant(group, rounds[variant], variant == last, args, deadline, progress)
            with tqdm.external_write_mode():
                print("\n".join(memory_report.table(measured, args.device, names).splitlines()[2:]), flush=True)
            rows += measured
    print("\n" + memory_report.notes(rows))
    return {"agreement": agreed, "rows": rows}


def measure_variant(specs, rounds, main, args, deadline, progress):
    """Rows of one variant: specs and figures in bytes and seconds."""
    samples, memory, growth = {}, {}, {}
    for spec in specs:
        progress.set_description(f"{spec.variant} {spec.implementation}")
        step = TrainingStep(spec)
        samples[spec], memory[spec] = partial(timing.wall_seconds, step), measure_memory(step)
        if main and spec.device == "cpu" and not args.no_resident:
            growth[spec] = resident_growth(spec, args.threads)
        progress.update()
    progress.set_description(f"{specs[0].variant} times")
    times = timing.interleave(samples, rounds, deadline)
    rows = []
    for spec in specs:
        row = asdict(spec) | asdict(memory[spec]) | {"resident_bytes": growth.get(spec)}
        row |= timing.quantile_row(times[spec]) | {"rounds": len(times[spec])}
        papers = PAPER_NETWORK.items() <= row.items()
        rows.append(row | {"paper_mb": PAPER.get((spec.variant, spec.implementation)) if papers else None})
    plain = next((row for row in rows if row["implementation"] == "plain"), None)
    for row in rows:
        row["memory_ratio"] = plain and plain["peak_bytes"] / row["peak_bytes"]
        row["time_ratio"] = plain and plain["seconds"] / row["seconds"]
    return rows


def main():
    args = parse_arguments()
    if args.keep_pages:
        environment.restart_with(environment.KEEP_PAGES)
    began, description = time.monotonic(), environment.begin(args.threads, args.device)
    common = {name: getattr(args, name) for name in ("size", "dtype", "device", "channels_last")}
    if args.model:
        try:
            measured = own_model.measure(args, args.input, began)
        except own_model.ModelError as error:
            sys.exit(str(error))
        results.publish(args, {"benchmark": "own_model", "machine": description} | measured)
    elif args.scaling:
        base = {"variant": (args.variants or ("A+B",))[-1], "batch_size": args.batch_size or 16} | common
        rows, fits = scaling.measure(base, args.growth_rate, args.implementations or scaling.IMPLEMENTATIONS)
        results.publish(args, {"benchmark": "scaling", "machine": description, "fits": fits, "rows": rows})
    else:
        measured = measure(choose_specs(args, common), args, began)
        results.write(args, {"benchmark": "memory", "machine": description} | measured)


if __name__ == "__main__":
    main()
