"""The results of speed.py as tables, and the targets beside them."""

from bench import MB
from bench.implementations import IMPLEMENTATIONS
from bench.roofline import rates_text
from bench.tables import Column, listed, paragraphs, quantiles_column, table_of
from bench.targets import target, targets_table

TITLE = "Speed of training and inference"
ALLOCATORS = {"default": "default malloc", "keep-pages": "malloc that keeps its pages"}
# The least times that fused, and fused with bottlenecks kept, shall be faster than the fastest other.
FASTER = {
    "default": {"cifar": (3.0, 3.3), "cifar-ab": (3.0, 3.3), "densenet121": (1.8, None), "bc190": (1.8, None)},
    "keep-pages": {"cifar": (2.4, 2.7), "cifar-ab": (2.4, 2.7), "densenet121": (1.5, None), "bc190": (1.5, None)},
}
INFERENCE = {"default": 1.5, "keep-pages": None}  # with a malloc that keeps its pages none was set
RESTRICTED = 1.5  # training, all with AVX2 alone
OF_ARITHMETIC, PEAK_MB = 1.7, {"cifar": 150, "cifar-ab": 150}

NOTES = """\
ms: median of interleaved steps, with 20 and 80 % quantiles; of it forward (with the loss), backward, optimizer, each a
median. faster: than the fastest implementation that is not this package's. peak MB: over parameters, gradients and
momentum, workspaces included. x arithmetic: times what the plain network's convolutions, computed directly, take at the
rate of the matrix product; x bytes: times what the fused network's reads and writes take at the rate of the copy. first:
seconds of the first step, where it is compiled; with the second allocator the compiler finds its earlier results.
Compared before: outputs and gradients of each peer in the step that is timed, with the plain network's under the same
weights, data and masks; those of eager peers on two images in float64 too, to 1e-9."""


def results_of(found, description, capability=None, dtype="float32"):
    """The results of all allocators, from the findings of each."""
    rows = rows_of(found)
    return {
        "benchmark": "speed",
        "machine": description,
        "facts": {allocator: findings.facts for allocator, findings in found.items()},
        "notes": {allocator: findings.notes for allocator, findings in found.items()},
        "targets": targets(rows, capability, dtype),
        "rows": rows,
    }


def rows_of(found):
    """Rows of all allocators, each with how many times as fast as the fastest other of its table it is."""
    rows, order = [], list(IMPLEMENTATIONS)
    for allocator, findings in found.items():
        names = list(dict.fromkeys(row.get("workload") for row in findings.rows.values()))
        chosen = [{"allocator": allocator} | row for row in findings.rows_with("implementation")]
        rows += sorted(chosen, key=lambda row: (names.index(row["workload"]), order.index(row["implementation"])))
    for table in tables_of(rows).values():
        if fastest := fastest_other(table):
            for row in table:
                row["faster"] = fastest["seconds"] / row["seconds"] if row.get("seconds") else None
    return rows


def tables_of(rows):
    """{(allocator, workload): rows} of each table."""
    found = {}
    for row in rows:
        found.setdefault((row["allocator"], row["workload"]), []).append(row)
    return found


def fastest_other(rows):
    """The row of a table that is the fastest right implementation of others, or None."""
    others = [row for row in rows if not row["implementation"].startswith("fused") and row.get("rounds")]
    return min(others, key=lambda row: row["seconds"], default=None)


def targets(rows, capability=None, dtype="float32"):
    """All targets. Another type and a lesser processor have fewer than AVX-512 with float32."""
    lesser, half = capability not in (None, "avx512"), dtype != "float32"
    return [
        target(f"{workload}, {ALLOCATORS[allocator]}: {name}", *limits)
        for (allocator, workload), table in tables_of(rows).items()
        for name, *limits in _targets_of_table(allocator, workload, table, lesser, half)
    ]


def _targets_of_table(allocator, workload, rows, lesser, half):
    """(name, found figure, least, most) of each."""
    found = {row["implementation"]: row for row in rows if row.get("rounds")}
    fused, kept = found.get("fused", {}), found.get("fused-kept", {})
    training = not workload.endswith("-inference")
    least = FASTER[allocator].get(workload, (INFERENCE[allocator], None))
    if half or lesser:
        least = ((1.0 if half else RESTRICTED) if training else None, None)
    fastest = fastest_other(rows)
    other = f"the fastest peer, {fastest['implementation']}" if fastest else "the fastest peer"
    yield f"fused against {other}", fused.get("faster"), least[0], None
    if kept.get("faster"):
        yield f"fused-kept against {other}", kept["faster"], least[1], None
    if training and half:
        seconds = [found.get(name, {}).get("seconds") for name in ("fused-float32", "fused")]
        yield "fused against fused float32", seconds[0] / seconds[1] if all(seconds) else None, 1.0, None
    elif training and not lesser:
        yield "fused over the arithmetic's time", fused.get("of_arithmetic"), None, OF_ARITHMETIC
        if workload in PEAK_MB:
            yield "fused peak MB", fused["peak_bytes"] / MB if fused else None, None, PEAK_MB[workload]


def body(results):
    """All tables, notes and the summary."""
    parts = []
    for (allocator, workload), rows in tables_of(results["rows"]).items():
        facts = results["facts"][allocator]
        rates = facts.get(f"rates {workload}")
        parts += [
            f"## {rows[0]['title']}, {ALLOCATORS[allocator]}",
            f"Limits measured between the steps: {rates_text(rates)}." if rates else "",
            _table(rows),
            listed(_remarks(rows, facts.get(f"left out {workload}", {}))),
        ]
    notes = [note for listed_notes in results["notes"].values() for note in listed_notes]
    return paragraphs(*parts, "## Notes", NOTES, *notes, "## Summary", targets_table(results["targets"]))


def _table(rows):
    columns = [
        Column("implementation", "implementation"),
        Column("layout", "layout"),
        Column("ms", "seconds", "{:.1f}", 1e3),
        quantiles_column(1, alone="not interleaved"),
    ]
    if rows[0]["training"]:
        columns += [Column(p, f"{p}_seconds", "{:.1f}", 1e3) for p in ("forward", "backward", "optimizer")]
    columns += [
        Column("faster", "faster", "{:.2f}x"),
        Column("peak MB", "peak_bytes", "{:.1f}", 1 / MB),
        Column("x arithmetic", "of_arithmetic", "{:.2f}"),
        Column("x bytes", "of_bytes", "{:.2f}"),
        Column("first", lambda row: row["warm_up_seconds"] if row["compiled"] else None, "{:.0f}"),
    ]

    def failure(row):
        if "error" in row:
            return [row["implementation"], row["layout"], "out of time" if row["error"] == "out of time" else "failed"]

    return table_of(columns, rows, failure)


def _remarks(rows, left_out):
    remarks = [f"{row['implementation']}: {row['error']}" for row in rows if "error" in row]
    for row in rows:
        error = max(row.get(kind, {}).get("running statistics", 0.0) for kind in ("errors", "float64_errors"))
        if error > 1e-3:
            name = row["implementation"]
            remarks.append(f"{name}: running statistics differ from the plain network's by {error:.0e}")
    reasons = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    return remarks + [f"left out: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
