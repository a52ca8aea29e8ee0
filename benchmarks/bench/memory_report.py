"""The results of memory.py as a table, whose rows can be printed one by one."""

from bench import MB
from bench.tables import Column, paragraphs, quantiles_column, table_of

TITLE = "Memory and time of a training step"


def columns_of(device):
    if device.startswith("cuda"):
        whole = [Column("reserved MB", "reserved_bytes", "{:.0f}", 1 / MB)]
    else:
        whole = [
            Column("arena MB", lambda row: row["workspace_bytes"] or None, "{:.0f}", 1 / MB),
            Column("resident MB", "resident_bytes", "{:.0f}", 1 / MB),
        ]
    return [
        Column("variant", _paper_name),
        Column("implementation", "implementation"),
        Column("peak MB", "peak_bytes", "{:.0f}", 1 / MB),
        Column("less", "memory_ratio", "{:.1f}x"),
        Column("kept MB", "kept_bytes", "{:.0f}", 1 / MB),
        *whole,
        Column("s a step", "seconds", "{:.3f}"),
        quantiles_column(3, 1),
        Column("faster", "time_ratio", "{:.2f}x"),
        Column("paper MB", "paper_mb"),
    ]


def _paper_name(row):
    """The paper's name of a variant: A+B computed memory-efficiently is its A+B+C."""
    efficient = row["variant"] == "A+B" and row["implementation"].startswith("fused")
    return row["variant"] + "+C" if efficient else row["variant"]


def table(rows, device, implementations):
    """The table, or a part of it with the same columns: their widths hang on the implementations' names alone."""
    columns = columns_of(device)
    widths = {"implementation": max(map(len, implementations)), "20-80 %": len("10.000-10.000")}
    return table_of(columns, rows, least=[widths.get(column.title, 5) for column in columns])


def body(results):
    rows = results["rows"]
    lines = table(rows, rows[0]["device"], [row["implementation"] for row in rows])
    return paragraphs(introduction(rows[0], results["agreement"]), lines, notes(rows))


def introduction(first, agreement):
    """The agreement of the implementations, and the network of the table."""
    network = f"DenseNet-BC({first['depth']}, k={first['growth_rate']})"
    size = f"batch {first['batch_size']}, {first['size']}x{first['size']}"
    return agreement_text(agreement) + f"\n\n{network}, {size}, {first['dtype']}, {first['device']}"


def agreement_text(results):
    """The largest errors in each type, as a sentence a type."""
    if not results:
        return "One implementation: nothing to compare."
    lines = []
    for dtype in dict.fromkeys(r["dtype"] for r in results):
        chosen = [r["errors"] for r in results if r["dtype"] == dtype]
        errors = ", ".join(f"{kind} to {max(errors[kind] for errors in chosen):.0e}" for kind in chosen[0])
        lines.append(f"{dtype}: {errors}")
    names = ", ".join(dict.fromkeys(r["implementation"] for r in results))
    return f"Agree with plain, from the same weights, data and random state ({names}):\n" + "\n".join(lines)


def notes(rows):
    counts = {row["variant"]: row["rounds"] for row in rows}
    lines = [
        "peak: highest level in a training step, over parameters, gradients and momentum; kept: of it, what lives from "
        "forward to backward.",
        "less, faster: against plain, same variant. Times: median and 20-80 % quantiles of interleaved steps: "
        + ", ".join(f"{count} of {variant}" for variant, count in counts.items()),
    ]
    if any(row["workspace_bytes"] for row in rows):
        lines.append(
            "arena: part of the peak that is the library's own workspaces and not torch's; stays for the next step."
        )
    if any(row["resident_bytes"] for row in rows):
        lines.append("resident: growth of a fresh process in one step, whoever allocates.")
    if any(row["paper_mb"] for row in rows):
        lines.append("paper: its Table 1, an RTX 3060; its C recomputes as checkpoint does.")
    return "\n".join(lines)
