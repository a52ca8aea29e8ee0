"""Runs the five variants of the hybrid approach and writes the paper's tables and figures, its numbers beside ours.

    python examples/paper_tables.py                                              # digits: two cores, minutes
    python examples/paper_tables.py --dataset cifar100 tiny-imagenet --download  # the paper's; a GPU, days

Options that this program does not know go to train.py, such as --amp bf16 or --device cuda:1. A run that was
interrupted is continued, one that has ended is not run again, so the same command brings the tables up to date.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

from training.plots import QUANTITIES, draw

from densenet_ext.models import VARIANTS

HERE = Path(__file__).resolve().parent
DATASETS = {"digits": "Digits", "cifar100": "CIFAR-100", "tiny-imagenet": "Tiny ImageNet"}

# Tables 1 and 2 of the paper: accuracy in percent, peak memory in MB, training time; None: not known to us.
PAPER = {
    "cifar100": {
        "vanilla": (72.68, 1222, "8h18m"),
        "A": (74.34, None, None),
        "B": (73.48, None, None),
        "A+B": (74.97, 1164, "10h35m"),
        "A+B+C": (74.14, 505, "13h26m"),
    },
    "tiny-imagenet": {
        "vanilla": (52.08, None, None),
        "A": (53.74, None, None),
        "B": (53.65, None, None),
        "A+B": (54.39, None, None),
        "A+B+C": (54.50, None, None),
    },
    "digits": {},
}
COLUMNS = ("Variant", "Accuracy (%)", "paper's", "Peak memory (MB)", "paper's", "Training time", "paper's")
MEMORY = ("Peak memory: allocated on the GPU.", "Peak memory: growth of the process's resident set.")
NOTES = {
    "digits": "This is none of the paper's data sets: it shows that all variants train, and what they cost side by side.",
    "cifar100": "The paper's figures: its Table 1, on an RTX 3060.",
    "tiny-imagenet": "The paper's figures: its Table 2, on an RTX 3060.",
}
FIELDS = (
    "variant",
    "test_accuracy",
    "paper_accuracy",
    "peak_memory_mb",
    "paper_peak_memory_mb",
    "train_seconds",
    "paper_time",
)


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--dataset", nargs="+", choices=DATASETS, default=["digits"])
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--output", type=Path, default=Path("runs/paper"), help="folder of the tables, figures and runs")
    add("--tables-only", action="store_true", help="of the runs that have ended; start none")
    return parser.parse_known_args(argv)


def run(dataset, variant, folder, rest):
    """Trains one variant, in a process of its own, from where an earlier call was interrupted."""
    ready = HERE / "configs" / f"{dataset}-{variant}.yaml"
    config = ready if ready.exists() else HERE / "configs" / f"{dataset}.yaml"
    command = [
        sys.executable,
        HERE / "train.py",
        "--config",
        config,
        "--variant",
        variant,
        "--output",
        folder,
        "--resume",
    ]
    print(f"\n{DATASETS[dataset]}, {variant}: {folder}", flush=True)
    done = subprocess.run([*map(str, command), *rest])
    if done.returncode:
        sys.exit(f"error: {variant} on {dataset} has ended with code {done.returncode}; the same command continues it")


def result(folder):
    """What a run that has ended says of itself: its summary, its machine and its metrics; None for another."""
    if not (folder / "summary.json").exists():
        return None
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    environment = json.loads((folder / "environment.json").read_text())
    return {**json.loads((folder / "summary.json").read_text()), "environment": environment, "rows": rows}


def duration(seconds):
    """As in the paper: 8h18m; under an hour 3m05s."""
    if seconds >= 3600:
        return "{}h{:02d}m".format(*divmod(round(seconds / 60), 60))
    return "{}m{:02d}s".format(*divmod(round(seconds), 60))


def table_rows(dataset, results):
    """One a variant: ours and the paper's, by the names of FIELDS."""
    for variant, ours in results.items():
        theirs = PAPER[dataset].get(variant, (None, None, None))
        own = (ours["test_accuracy"], ours["peak_memory_mb"], ours["train_seconds"])
        pairs = [value for pair in zip(own, theirs, strict=True) for value in pair]
        yield dict(zip(FIELDS, [variant, *pairs], strict=True))


def markdown(dataset, results):
    """The table, and above it what it was made with."""
    lines = [f"## {DATASETS[dataset]}", "", conditions(dataset, results), ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    for row in table_rows(dataset, results):
        ours = (f"{row['test_accuracy']:.2f}", f"{row['peak_memory_mb']:.0f}", duration(row["train_seconds"]))
        theirs = (row["paper_accuracy"], row["paper_peak_memory_mb"], row["paper_time"])
        cells = [
            cell for own, paper in zip(ours, theirs, strict=True) for cell in (own, "–" if paper is None else paper)
        ]
        lines.append(f"| {row['variant']} | {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


def conditions(dataset, results):
    """The network, the recipe and the machine, and what the table is."""
    run = next(iter(results.values()))
    environment = run["environment"]
    where = f"{environment['cpu']}, {environment['threads']} threads" if run["device"] == "cpu" else run["device"]
    what = (
        f"DenseNet-BC({run['depth']}, k={run['growth_rate']}), {run['epochs']} epochs, batch {run['batch_size']}, "
        f"seed {run['seed']}, by paper_tables.py; {where}, torch {run['torch']}, densenet_ext {environment['densenet_ext'].split(',')[0]}. "
        f"{MEMORY[run['device'] == 'cpu']}"
    )
    return f"{what} {NOTES[dataset]}"


def figures(output, dataset, results):
    """Loss and accuracy of the variants over the epochs, like the paper's figures 6 and 7."""
    for quantity in QUANTITIES:
        curves = {variant: (run["rows"], "validation") for variant, run in results.items()}
        draw(output / f"{dataset}-{quantity}.png", quantity, curves, f"{DATASETS[dataset]}, validation")


def write_tables(output, tables):
    """tables.md, and for each data set a CSV and the two figures."""
    output.mkdir(parents=True, exist_ok=True)
    parts = []
    for dataset, results in tables.items():
        with open(output / f"{dataset}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(table_rows(dataset, results))
        parts.append(markdown(dataset, results))
        figures(output, dataset, results)
    text = "\n".join(parts)
    (output / "tables.md").write_text(text)
    print(f"\n{text}\n{output / 'tables.md'}")


def main(argv=None):
    args, rest = parse_arguments(argv)
    if args.tables_only and rest:
        sys.exit(f"error: {' '.join(rest)}: options of train.py have no meaning with --tables-only")
    tables = {}
    for dataset in args.dataset:
        for variant in args.variants:
            folder = args.output / f"{dataset}-{variant}"
            if not args.tables_only:
                run(dataset, variant, folder, rest)
            ended = result(folder)
            if ended is not None:
                tables.setdefault(dataset, {})[variant] = ended
    if not tables:
        sys.exit(f"error: no run in {args.output} has ended yet; without --tables-only they are run")
    write_tables(args.output, tables)


if __name__ == "__main__":
    main()
