"""The largest batch, and the deepest network, that one training step can have within a budget of memory.

    python benchmarks/largest_batch.py --budget-mb 2000

For fused networks on a CPU densenet_ext.largest_batch predicts the batch; measurements then check it.

Counted are parameters, gradients, momentum, and the step's peak over them. On a CPU that is measured
(bench/memory_meter.py) at sizes that a line through earlier measurements predicts, until one fits and the next larger one
does not; workspaces, which come in pages of 2 MB, make it a line with steps. On a GPU the budget is the allocator's, by
default the whole device, and what does not fit is a real lack of memory.
"""

import gc
import time

import torch
from bench import MB, environment, options, results
from bench.implementations import EAGER
from bench.memory_meter import measure_memory
from bench.networks import VARIANTS, Spec, build_model
from bench.steps import TrainingStep
from bench.tables import Column, first_line, paragraphs, table_of
from tqdm import tqdm

import densenet_ext

TITLE = "Largest batch and deepest network"
MOST = {"batch": 1 << 16, "depth": 400}  # images, layers of a block: nobody asks for more
PREDICTED = 5  # measurements of a row that trust the line; the later ones halve the interval
DEFAULT = ("plain", "torchvision-efficient", "checkpoint", "selective", "fused", "fused-kept")
SETTINGS = ("variant", "depth", "batch_size", "growth_rate", "size", "dtype", "device")


def parse_arguments(arguments=None):
    parser = options.new_parser(__doc__)
    add = parser.add_argument
    add("--budget-mb", type=float, help="default 2000 on a CPU, the whole device on a GPU")
    environment.add_device(parser)
    add("--implementations", type=options.names(EAGER), default=DEFAULT, help="default: " + ",".join(DEFAULT))
    add("--variant", default="BC", choices=("BC", *VARIANTS), help="default BC: without dropout")
    add("--search", type=options.names(MOST), default=tuple(MOST), help="batch,depth")
    add("--depth", type=int, default=100, help="of the network whose batch grows")
    add("--batch-size", type=int, default=16, help="of the network whose depth grows")
    add("--growth-rate", type=int, default=12)
    add("--size", type=int, default=32, help="height and width of the images")
    add("--dtype", default="float32", choices=options.DTYPES)
    environment.add_threads(parser)
    add("--time-limit", type=float, default=1200, help="seconds after which no row is begun")
    options.add_outputs(parser)
    return parser.parse_args(arguments)


def largest(bytes_of, budget, most, guess=2):
    """The largest n up to `most` with bytes_of(n) <= budget, 0 if there is none, and {n: bytes} of all measurements.

    bytes_of(n) grows with n and is None where there was no memory at all. `guess` is measured first.
    """
    found, low, high = {}, 0, most + 1
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        found[guess] = bytes_of(guess)
        if found[guess] is not None and found[guess] <= budget:
            low = guess
        else:
            high = guess
        guess = _predict(found, budget, low) if len(found) < PREDICTED or high > most else (low + high) // 2
    return low, found


def _predict(found, budget, low):
    """The n at which a line through the two measurements next to the budget meets it, and at most four times `low`."""
    near = sorted((n for n, value in found.items() if value is not None), key=lambda n: abs(found[n] - budget))[:2]
    if len(near) < 2:
        return max(1, 2 * low)
    slope = (found[near[0]] - found[near[1]]) / (near[0] - near[1])
    return max(1, min(4 * low, int(near[0] + (budget - found[near[0]]) / slope))) if slope > 0 else 2 * low


def state_bytes(model):
    """Parameters, their gradients and momentum, and buffers."""
    return sum(3 * p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())


def predicted_batch(spec, budget):
    """The batch that the package predicts for a fused network on a CPU, or None."""
    if spec.implementation != "fused" or spec.device != "cpu":
        return None
    model, size = build_model(spec), (1, 3, spec.size, spec.size)
    room = int(budget - state_bytes(model))
    try:
        return densenet_ext.largest_batch(model, size, room, dtype=getattr(torch, spec.dtype)) if room > 0 else None
    except ValueError:  # not even one sample fits
        return None


def step_bytes(spec):
    """All that training takes: parameters, buffers, gradients, momentum and the step's peak; None if it does not fit."""
    step = None
    try:
        step = TrainingStep(spec)
        return state_bytes(step.model) + measure_memory(step).peak_bytes
    except torch.OutOfMemoryError:
        return None
    finally:
        del step
        gc.collect()
        if spec.device.startswith("cuda"):
            torch.cuda.empty_cache()


def choose_budget(device, megabytes=None):
    """Bytes; on a GPU its allocator is held to them."""
    if not device.startswith("cuda"):
        return (megabytes or 2000) * MB
    total = torch.cuda.get_device_properties(device).total_memory
    if megabytes:
        torch.cuda.set_per_process_memory_fraction(min(1.0, megabytes * MB / total), device)
    return min(total, megabytes * MB) if megabytes else total


def spec_function(settings, search, implementation):
    """The function n -> spec: n images, or n layers in each block."""
    base = {name: settings[name] for name in ("growth_rate", "size", "dtype", "device")}
    base |= {"implementation": implementation, "variant": "" if settings["variant"] == "BC" else settings["variant"]}
    if search == "batch":
        return lambda n: Spec(batch_size=n, depth=settings["depth"], **base)
    return lambda n: Spec(batch_size=settings["batch_size"], depth=6 * n + 4, **base)


def measure(settings, searches, implementations, budget, deadline):
    """A row for each implementation and each search."""
    rows = []
    cells = [(search, implementation) for search in searches for implementation in implementations]
    for search, implementation in tqdm(cells, desc="largest", disable=None):
        row = {"search": search, "implementation": implementation, "budget_bytes": budget}
        row["variant"] = settings["variant"]
        if time.monotonic() > deadline:
            rows.append(row | {"error": "out of time"})
            continue
        spec_of = spec_function(settings, search, implementation)
        try:
            predicted = predicted_batch(spec_of(1), budget) if search == "batch" else None
            n, found = largest(lambda n, spec_of=spec_of: step_bytes(spec_of(n)), budget, MOST[search], predicted or 2)
            row["predicted"] = predicted
        except Exception as error:  # an implementation that fails is a row
            rows.append(row | {"error": first_line(error)})
            continue
        value = 6 * n + 4 if search == "depth" and n else n
        rows.append(row | {"largest": value, "bytes": found.get(n), "measured": found, "next_bytes": found.get(n + 1)})
    for row in rows:
        plain = next((r for r in rows if (r["search"], r["implementation"]) == (row["search"], "plain")), {})
        row["times_plain"] = row["largest"] / plain["largest"] if plain.get("largest") and "largest" in row else None
    return rows


def body(results):
    s, parts = results["settings"], []
    for search in dict.fromkeys(row["search"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["search"] == search]
        fixed = f"depth {s['depth']}" if search == "batch" else f"batch {s['batch_size']}"
        columns = [
            Column("implementation", "implementation"),
            Column(search, lambda row: row.get("error", str(row.get("largest")))),
            Column("plain's", "times_plain", "{:.1f}x"),
            *([Column("predicted", "predicted")] if any(row.get("predicted") for row in rows) else []),
            Column("MB", lambda row: row.get("bytes") or None, "{:.0f}", 1 / MB),
            Column("MB of the next", lambda row: row.get("next_bytes") or None, "{:.0f}", 1 / MB),
        ]
        parts += [
            f"Largest {search} within {rows[0]['budget_bytes'] / MB:.0f} MB: DenseNet-BC(k={s['growth_rate']}) "
            f"{s['variant']}, {fixed}, {s['size']}x{s['size']}, {s['dtype']}, {s['device']}",
            table_of(columns, rows),
        ]
    return paragraphs(*parts)


def main():
    args = parse_arguments()
    description = environment.begin(args.threads, args.device)
    settings = {name: getattr(args, name) for name in SETTINGS}
    budget = choose_budget(args.device, args.budget_mb)
    deadline = time.monotonic() + args.time_limit
    rows = measure(settings, args.search, args.implementations, budget, deadline)
    measured = {"benchmark": "largest_batch", "machine": description, "settings": settings, "rows": rows}
    results.publish(args, measured)


if __name__ == "__main__":
    main()
