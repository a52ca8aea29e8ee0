"""Cost of an image in a training step against the batch size, and against the number of threads, on a CPU.

Small batches have less for each kernel to do, large ones more than the caches hold: a flat line is what is wanted, and
half the time with twice the threads. All sizes and numbers of threads are timed in turn, in interleaved rounds.
"""

from functools import partial

import torch
from tqdm import tqdm

from bench.steps import new_step
from bench.tables import Column, paragraphs, quantiles_column, table_of
from bench.timing import interleave, quantile_row

TITLE = "Cost of an image by batch size and threads"
SIZES = (1, 8, 16, 32, 64, 128, 256)
FLAT_FROM, FLAT, SPEEDUP = 8, 1.15, 1.8  # this batch and larger ones: cost over the least one; two threads against one


def measure(workload_of, implementations, sizes, threads, rounds, deadline):
    """A row for each implementation, batch size and number of threads; `workload_of` is a function of the size."""
    samples, cells = {}, {}
    progress = tqdm(desc="batches", unit="step", disable=None)
    for name in implementations:
        for size in sizes:
            workload = workload_of(size)
            step = new_step(workload, name)
            step.first = None
            for count in dict.fromkeys(threads):
                row = {"workload": workload.name, "implementation": name, "dtype": workload.spec.dtype}
                cells[name, size, count] = row | {"batch_size": size, "threads": count}
                samples[name, size, count] = partial(_seconds, step, count, progress)
    progress.reset(rounds * len(samples))
    times = interleave(samples, rounds, deadline)
    progress.close()
    rows = [cell | quantile_row(times[key]) | {"rounds": len(times[key])} for key, cell in cells.items()]
    for row in rows:
        row["seconds_an_image"] = row["seconds"] / row["batch_size"]
    return [row | _ratios(row, rows) for row in rows]


def _seconds(step, threads, progress):
    torch.set_num_threads(threads)
    progress.update()
    return sum(step.timed())


def _ratios(row, rows):
    """The cost of an image over the least one of large batches, and the speedup over one thread."""
    alike = [r for r in rows if r["implementation"] == row["implementation"]]
    flat = [r for r in alike if r["threads"] == row["threads"] and r["batch_size"] >= FLAT_FROM]
    one = next((r for r in alike if (r["batch_size"], r["threads"]) == (row["batch_size"], 1)), None)
    least = min((r["seconds_an_image"] for r in flat), default=None)
    return {
        "over_least": row["seconds_an_image"] / least if least else None,
        "speedup": one["seconds"] / row["seconds"] if one else None,
    }


def body(results):
    columns = [
        Column("implementation", "implementation"),
        Column("batch", "batch_size"),
        Column("threads", "threads"),
        Column("ms", "seconds", "{:.1f}", 1e3),
        quantiles_column(1),
        Column("ms an image", "seconds_an_image", "{:.2f}", 1e3),
        Column("over the least", "over_least", "{:.2f}"),
        Column("against 1 thread", "speedup", "{:.2f}x"),
    ]
    return paragraphs(
        f"{results['title']}: by batch size and threads",
        table_of(columns, results["rows"]),
        f"Wanted: from batch {FLAT_FROM} on at most {FLAT} over the least; two threads at least {SPEEDUP}x one.",
    )
