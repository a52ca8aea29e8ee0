"""Run the five variants of the hybrid approach and write the paper's tables and figures, its numbers beside ours.

    python examples/paper_tables.py                                              # digits: two cores, minutes
    python examples/paper_tables.py --dataset cifar100 tiny-imagenet --download  # the paper's; a GPU, days

Options that this program does not know go to train.py, such as --amp bf16 or --device cuda:1. A run that was
interrupted is continued, one that has ended is not run again, so the same command brings the tables up to date.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

from training.cli import make_parser
from training.records import QUANTITIES, draw

from densenet_ext.models import VARIANTS

HERE = Path(__file__).resolve().parent
DATASETS = {"digits": "Digits", "cifar100": "CIFAR-100", "tiny-imagenet": "Tiny ImageNet"}

# Tables 1 and 2 of the paper: accuracy in percent, peak memory in MB, training time.
PAPER = {
    "digits": {},
    "cifar100": {
        "vanilla": (72.68, 1222, "8h18m"),
        "A": (74.34, 1115, "10h"),
        "B": (73.48, 1229, "8h36m"),
        "A+B": (74.97, 1164, "10h35m"),
        "A+B+C": (74.14, 505, "13h26m"),
    },
    "tiny-imagenet": {
        "vanilla": (52.08, 1200, "5h43m"),
        "A": (53.74, 1114, "5h51m"),
        "B": (53.65, 1230, "6h47m"),
        "A+B": (54.39, 2144, "9h53m"),
        "A+B+C": (54.50, 505, "13h35m"),
    },
}
NOTES = {
    "digits": "This is none of the paper's data sets: it shows that all variants train, and what they cost side by side.",
    "cifar100": "The paper's figures: its Table 1, on an RTX 3060.",
    "tiny-imagenet": "The paper's figures: its Table 2; vanilla, A and B on an L4, the others on an RTX 3060.",
}
MEMORY = {True: "growth of the process's resident set", False: "allocated on the GPU"}  # on a CPU, on a GPU
COLUMNS = ("Variant", "Accuracy (%)", "paper's", "Peak memory (MB)", "paper's", "Training time", "paper's")
FIELDS = "variant test_accuracy paper_accuracy peak_memory_mb paper_peak_memory_mb train_seconds paper_time".split()


def parse_arguments(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--dataset", nargs="+", choices=DATASETS, default=["digits"])
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--output", type=Path, default=Path("runs/paper"), help="folder of the tables, figures and runs")
    add("--tables-only", action="store_true", help="of the runs that have ended; start none")
    return parser.parse_known_args(argv)


def run(dataset, variant, folder, options):
    """Train one variant in another process, from where an earlier call was interrupted."""
    configs = [HERE / "configs" / f"{name}.yaml" for name in (f"{dataset}-{variant}", dataset)]
    config = next(path for path in configs if path.exists())
    command = [sys.executable, HERE / "train.py", "--config", config, "--variant", variant, "--output", folder]
    print(f"\n{DATASETS[dataset]}, {variant}: {folder}", flush=True)
    done = subprocess.run([*map(str, command), "--resume", *options])
    if done.returncode:
        sys.exit(f"error: {variant} on {dataset} has ended with code {done.returncode}; the same command continues it")


def read_result(folder):
    """Return the summary, the machine and the metrics of a run that has ended; None for another."""
    if not (folder / "summary.json").exists():
        return None
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    summary, environment = (json.loads((folder / f"{name}.json").read_text()) for name in ("summary", "environment"))
    return {**summary, "environment": environment, "rows": rows}


def duration(seconds):
    """Format as the paper does: 8h18m; under an hour 3m05s."""
    if seconds >= 3600:
        return "{}h{:02d}m".format(*divmod(round(seconds / 60), 60))
    return "{}m{:02d}s".format(*divmod(round(seconds), 60))


def table_row(dataset, variant, result):
    """Return our figures and the paper's, by the names of FIELDS."""
    accuracy, memory, time = PAPER[dataset].get(variant, (None, None, None))
    ours = (result["test_accuracy"], result["peak_memory_mb"], result["train_seconds"])
    return dict(zip(FIELDS, (variant, ours[0], accuracy, ours[1], memory, ours[2], time), strict=True))


def markdown(dataset, results):
    """Return the table, and above it the network, the recipe and the machine."""
    run = next(iter(results.values()))
    environment = run["environment"]
    on_cpu = run["device"] == "cpu"
    where = f"{environment['cpu']}, {environment['threads']} threads" if on_cpu else run["device"]
    conditions = (
        f"DenseNet-BC({run['depth']}, k={run['growth_rate']}), {run['epochs']} epochs, batch {run['batch_size']}, "
        f"seed {run['seed']}, by paper_tables.py; {where}, torch {run['torch']}, "
        f"densenet_ext {environment['densenet_ext'].split(',')[0]}. Peak memory: {MEMORY[on_cpu]}. {NOTES[dataset]}"
    )
    lines = [f"## {DATASETS[dataset]}", "", conditions, ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    for variant, result in results.items():
        row = table_row(dataset, variant, result)
        shown = {"test_accuracy": "{:.2f}".format, "peak_memory_mb": "{:.0f}".format, "train_seconds": duration}
        cells = [shown.get(name, str)(value) if value is not None else "–" for name, value in row.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def write_tables(output, tables):
    """Write tables.md, and for each data set a CSV and two figures like the paper's 6 and 7."""
    output.mkdir(parents=True, exist_ok=True)
    for dataset, results in tables.items():
        with open(output / f"{dataset}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(table_row(dataset, variant, result) for variant, result in results.items())
        for quantity in QUANTITIES:
            curves = {variant: (result["rows"], "validation") for variant, result in results.items()}
            draw(output / f"{dataset}-{quantity}.png", quantity, curves, f"{DATASETS[dataset]}, validation")
    text = "\n".join(markdown(dataset, results) for dataset, results in tables.items())
    (output / "tables.md").write_text(text)
    print(f"\n{text}\n{output / 'tables.md'}")


def main(argv=None):
    args, options = parse_arguments(argv)
    if args.tables_only and options:
        sys.exit(f"error: {' '.join(options)}: options of train.py have no meaning with --tables-only")
    tables = {}
    for dataset in args.dataset:
        for variant in args.variants:
            folder = args.output / f"{dataset}-{variant}"
            if not args.tables_only:
                run(dataset, variant, folder, options)
            result = read_result(folder)
            if result is not None:
                tables.setdefault(dataset, {})[variant] = result
    if not tables:
        sys.exit(f"error: no run in {args.output} has ended yet; without --tables-only they are run")
    write_tables(args.output, tables)


if __name__ == "__main__":
    main()
