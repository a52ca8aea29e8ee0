"""The largest batch, and the deepest network, that one training step can have within a given memory, by implementation.

    python benchmarks/largest_batch.py --budget-mb 2000

Counted are parameters, gradients, momentum, and the step's peak over them. On a CPU that is measured (harness.py) at sizes
that a line through earlier measurements predicts, until one fits and the next larger one does not; workspaces, which come
in pages of 2 MB, make it a line with steps. On a GPU the budget is
the allocator's, by default the whole device, and what does not fit is a real lack of memory.
"""

import argparse
import gc
import time

import harness
import machine
import torch
from harness import MB, Spec
from tqdm import tqdm

DEFAULT = ("plain", "torchvision-efficient", "checkpoint", "selective", "fused", "fused-kept")
DEEPEST, LARGEST = 400, 1 << 16  # layers of a block, images: nobody asks for more
PREDICTED = 5  # measurements of a row that trust the line; those after them halve the interval


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--budget-mb", type=float, help="default 2000 on a CPU, the whole device on a GPU")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: the one there is")
    add("--implementations", type=machine.names(harness.IMPLEMENTATIONS), default=DEFAULT, help="default: " + ",".join(DEFAULT))  # fmt: skip
    add("--variant", default="BC", choices=("BC", *harness.VARIANTS), help="default BC: without dropout")
    add("--search", type=machine.names(("batch", "depth")), default=("batch", "depth"), help="batch,depth")
    add("--depth", type=int, default=100, help="of the network whose batch grows")
    add("--batch-size", type=int, default=16, help="of the network whose depth grows")
    add("--growth-rate", type=int, default=12)
    add("--size", type=int, default=32, help="height and width of the images")
    add("--dtype", default="float32", choices=harness.DTYPES)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--time-limit", type=float, default=1200, help="seconds after which no row is begun")
    add("--json", metavar="FILE")
    add("--csv", metavar="FILE")
    return parser.parse_args(arguments)


def largest(measure, budget, most):
    """The largest n up to `most` with measure(n) <= budget, 0 if there is none, and {n: bytes} of all measurements.

    measure(n) grows with n and gives None where there was no memory at all.
    """
    found, low, high, guess = {}, 0, most + 1, 2
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        found[guess] = measure(guess)
        if found[guess] is not None and found[guess] <= budget:
            low = guess
        else:
            high = guess
        guess = _predict(found, budget, low) if len(found) < PREDICTED or high > most else (low + high) // 2
    return low, found


def _predict(found, budget, low):
    """Where the line through the two measurements next to the budget meets it; not further than four times as far."""
    known = sorted((n for n, value in found.items() if value is not None), key=lambda n: abs(found[n] - budget))[:2]
    if len(known) < 2:
        return max(1, 2 * low)
    slope = (found[known[0]] - found[known[1]]) / (known[0] - known[1])
    return max(1, min(4 * low, int(known[0] + (budget - found[known[0]]) / slope))) if slope > 0 else 2 * low


def step_bytes(spec):
    """All that training takes: parameters, buffers, gradients, momentum and the step's peak; None if it does not fit."""
    step = None
    try:
        step = harness.TrainingStep(spec)
        state = sum(3 * p.nbytes for p in step.model.parameters()) + sum(b.nbytes for b in step.model.buffers())
        return state + harness.measure_memory(step).peak_bytes
    except torch.OutOfMemoryError:
        return None
    finally:
        del step
        gc.collect()
        if spec.device.startswith("cuda"):
            torch.cuda.empty_cache()


def choose_budget(args):
    """Bytes; on a GPU its allocator is held to them."""
    if not args.device.startswith("cuda"):
        return (args.budget_mb or 2000) * MB
    total = torch.cuda.get_device_properties(args.device).total_memory
    if args.budget_mb:
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.budget_mb * MB / total), args.device)
    return min(total, args.budget_mb * MB) if args.budget_mb else total


def specs_of(args, what, implementation):
    """n -> the spec: n images, or n layers in each block."""
    base = {"variant": "" if args.variant == "BC" else args.variant, "growth_rate": args.growth_rate, "size": args.size}
    base |= {"implementation": implementation, "dtype": args.dtype, "device": args.device}
    if what == "batch":
        return lambda n: Spec(batch_size=n, depth=args.depth, **base)
    return lambda n: Spec(batch_size=args.batch_size, depth=6 * n + 4, **base)


def measure(args, budget, deadline):
    """A row for each implementation and each search."""
    rows = []
    cells = [(what, implementation) for what in args.search for implementation in args.implementations]
    for what, implementation in tqdm(cells, desc="largest", disable=None):
        row = {"search": what, "implementation": implementation, "budget_bytes": budget, "variant": args.variant}
        if time.monotonic() > deadline:
            rows.append(row | {"error": "out of time"})
            continue
        spec_of = specs_of(args, what, implementation)
        try:
            n, found = largest(lambda n, of=spec_of: step_bytes(of(n)), budget, DEEPEST if what == "depth" else LARGEST)
        except Exception as error:  # an implementation that fails is a row
            rows.append(row | {"error": f"{type(error).__name__}: {error}"[:300]})
            continue
        value = 6 * n + 4 if what == "depth" and n else n
        rows.append(row | {"largest": value, "bytes": found.get(n), "measured": found, "next_bytes": found.get(n + 1)})
    for row in rows:
        plain = next(
            (r.get("largest") for r in rows if (r["search"], r["implementation"]) == (row["search"], "plain")), 0
        )
        row["times_plain"] = row["largest"] / plain if plain and "largest" in row else None
    return rows


def markdown(args, rows):
    parts = []
    for what in args.search:
        fixed = f"depth {args.depth}" if what == "batch" else f"batch {args.batch_size}"
        parts.append(
            f"Largest {what} within {rows[0]['budget_bytes'] / MB:.0f} MB: DenseNet-BC(k={args.growth_rate}) {args.variant}, "
            f"{fixed}, {args.size}x{args.size}, {args.dtype}, {args.device}"
        )
        cells = [
            [
                r["implementation"],
                r.get("error", str(r.get("largest"))),
                f"{r['times_plain']:.1f}x" if r["times_plain"] else "",
                f"{r['bytes'] / MB:.0f}" if r.get("bytes") else "",
                f"{r['next_bytes'] / MB:.0f}" if r.get("next_bytes") else "",
            ]
            for r in rows
            if r["search"] == what
        ]
        parts.append(machine.table(["implementation", what, "plain's", "MB", "MB of the next"], cells))
    return "\n\n".join(parts)


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    description = machine.describe(args.device)
    print(machine.heading(description) + "\n", flush=True)
    rows = measure(args, choose_budget(args), time.monotonic() + args.time_limit)
    print(markdown(args, rows))
    if args.json:
        machine.write_json(args.json, description, rows)
    if args.csv:
        rows = [{k: v for k, v in row.items() if k != "measured"} for row in rows]
        columns = dict.fromkeys(key for row in rows for key in row)
        machine.write_csv(args.csv, description, [{key: row.get(key) for key in columns} for row in rows])


if __name__ == "__main__":
    main()
