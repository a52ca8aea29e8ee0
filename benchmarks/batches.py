"""Cost of an image in a training step against the batch size, and against the number of threads, on a CPU.

    python benchmarks/batches.py --workload cifar --implementations fused

Small batches have less for each kernel to do, large ones more than the caches hold: a flat line is what is wanted, and
half the time with twice the threads. All sizes and numbers of threads are timed in turn, in interleaved rounds.
"""

import argparse
import time

import harness
import machine
import torch
import workloads
from speed_steps import PEERS, new_step
from tqdm import tqdm

SIZES = (1, 8, 16, 32, 64, 128, 256)
FLAT_FROM, FLAT, SPEEDUP = 8, 1.15, 1.8  # from this batch on, cost over the least one; two threads against one


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    eager = [name for name in PEERS if PEERS[name].runner == "eager"]
    add("--workload", choices=workloads.NAMES, default="cifar")
    add("--implementations", type=machine.names(eager), default=("fused",), help=",".join(eager))
    add("--batch-sizes", type=_numbers, default=SIZES, help="default " + ",".join(map(str, SIZES)))
    add("--threads", type=_numbers, default=(1, torch.get_num_threads()), help="default: 1 and all")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--rounds", type=int, default=5)
    add("--time-limit", type=float, default=600, help="seconds after which no round is begun")
    add("--quick", action="store_true", help="tiny networks: no figure means anything")
    add("--json", metavar="FILE")
    add("--csv", metavar="FILE")
    return parser.parse_args(arguments)


def _numbers(text):
    return tuple(int(word) for word in text.split(","))


def measure(args, deadline):
    """A row for each implementation, batch size and number of threads."""
    samples = {}
    for name in args.implementations:
        for size in args.batch_sizes:
            step = new_step(workloads.find(args.workload, args.dtype, size, args.quick), name)
            step.first = None
            for threads in dict.fromkeys(args.threads):
                samples[name, size, threads] = lambda step=step, threads=threads: _seconds(step, threads)
    with tqdm(total=args.rounds * len(samples), desc="batches", unit="step", disable=None) as progress:
        times = harness.interleave(samples, args.rounds, deadline, progress, seconds=lambda sample: sample())
    rows = []
    for (name, size, threads), found in times.items():
        median, low, high = harness.quantiles(found)
        row = {"workload": args.workload, "implementation": name, "dtype": args.dtype, "batch_size": size}
        row |= {"threads": threads, "seconds": median, "seconds_20": low, "seconds_80": high, "rounds": len(found)}
        rows.append(row | {"seconds_an_image": median / size})
    for row in rows:
        alike = [r for r in rows if r["implementation"] == row["implementation"]]
        flat = [r for r in alike if r["threads"] == row["threads"] and r["batch_size"] >= FLAT_FROM]
        one = next((r for r in alike if (r["batch_size"], r["threads"]) == (row["batch_size"], 1)), None)
        least = min((r["seconds_an_image"] for r in flat), default=None)
        row["over_least"] = row["seconds_an_image"] / least if least else None
        row["speedup"] = one["seconds"] / row["seconds"] if one else None
    return rows


def _seconds(step, threads):
    torch.set_num_threads(threads)
    return sum(step.timed())


def markdown(rows):
    cells = []
    for r in rows:
        line = [r["implementation"], str(r["batch_size"]), str(r["threads"]), f"{1e3 * r['seconds']:.1f}"]
        line += [f"{1e3 * r['seconds_20']:.1f}-{1e3 * r['seconds_80']:.1f}", f"{1e3 * r['seconds_an_image']:.2f}"]
        line += [f"{r['over_least']:.2f}" if r["over_least"] else "", f"{r['speedup']:.2f}x" if r["speedup"] else ""]
        cells.append(line)
    header = [
        "implementation",
        "batch",
        "threads",
        "ms",
        "20-80 %",
        "ms an image",
        "over the least",
        "against 1 thread",
    ]
    wanted = f"Wanted: from batch {FLAT_FROM} on at most {FLAT} over the least; two threads at least {SPEEDUP}x one."
    return machine.table(header, cells) + "\n\n" + wanted


def main():
    args = parse_arguments()
    description = machine.describe("cpu")
    print(machine.heading(description) + "\n", flush=True)
    rows = measure(args, time.monotonic() + args.time_limit)
    print(f"{workloads.find(args.workload, args.dtype, tiny=args.quick).title}: by batch size and threads\n")
    print(markdown(rows))
    if args.json:
        machine.write_json(args.json, description, rows)
    if args.csv:
        machine.write_csv(args.csv, description, rows)


if __name__ == "__main__":
    main()
