"""The results of gpu.py as tables.

Where the build failed there still are results to write, so nothing here needs the library.
"""

from bench import MB, TITLES, results
from bench.implementations import IMPLEMENTATIONS
from bench.roofline import FORMULAS
from bench.tables import Column, listed, paragraphs, quantiles_column, table_of
from bench.targets import targets_table

TITLE = "Training on {name}"
AGREEMENT = {
    "plain": "plain",
    "fused": "fused",
    "fused-kept": "fused with bottlenecks kept",
    "masked": "fused with masks",
}
STEP_NOTES = (
    "ms a step: median and 20-80 % quantiles of interleaved steps, device time from an idle device. Peak: over "
    "parameters, gradients and momentum; reserved: what the allocator took for it; kept: what lives from forward to "
    "backward. Faster and less are against the plain network in the better of its layouts, and against the "
    "checkpointed one. Launches: kernels in one step; busy: how long they ran; counted at the end, without cuDNN's "
    "search for algorithms."
)
KERNEL_NOTES = (
    "us: median of calls whose data is not in the L2 cache; host us: what queuing one takes. Of floor: the longer of "
    "bytes / copy bandwidth and operations / product rate, over the time.\nBytes, e a stored value, a = 4: "
    + "; ".join(f"{op} {formula}" for op, formula in FORMULAS.items())
    + "."
)


def heading(machine):
    """The lines that say what was measured on; none if the library could not be loaded."""
    if "torch" not in machine:
        return ""
    return results.heading(machine) + (
        f"\ndriver {machine['driver']}, compute capability {machine['capability']}, {machine['multiprocessors']} "
        f"multiprocessors, L2 cache {machine['l2_mb']} MB; cudnn.benchmark {machine['cudnn_benchmark']}, "
        f"TF32: {machine['tf32']}"
    )


def body(found):
    return paragraphs(*sections_of(found))


def sections_of(found):
    """Text of every part that has anything to show."""
    texts = {
        "Targets": targets_table(found["targets"]) if found.get("targets") else "",
        "Training steps": steps_text(found["steps"], found.get("agreement", {})) if found.get("steps") else "",
        "Kernels": kernels_text(found["kernels"], found.get("ceilings")) if found.get("kernels") else "",
        "Build and tests": checks_text(found),
        "Notes": listed(found.get("notes", [])),
    }
    return [f"## {title}\n\n{text}" for title, text in texts.items() if text]


def steps_text(rows, agreement):
    """A table for each network, type and batch size."""
    groups = {}
    for row in rows:
        groups.setdefault((row["net"], row["dtype"], row["batch_size"]), []).append(row)
    parts = []
    for (net, dtype, batch), chosen in groups.items():
        first = chosen[0]
        parts += [
            f"### {TITLES[net]} {first['variant']}, batch {batch}, {first['size']}x{first['size']}, {dtype}",
            agreement_text(agreement.get(f"{net} {dtype} {batch} agreement")),
            steps_table(chosen),
        ]
    return paragraphs(*parts, STEP_NOTES)


def agreement_text(found):
    if not found:
        return ""
    if "error" in found:
        return f"Gradients could not be compared: {found['error']}"
    errors = {name: f"{found[name]['outputs']:.1e} and {found[name]['gradients']:.1e}" for name in AGREEMENT}
    texts = ", ".join(f"{AGREEMENT[name]} {text}" for name, text in errors.items())
    verdict = "agree" if found["agrees"] else "DISAGREE"
    return f"Outputs and gradients {verdict}; relative errors against float64: {texts} against plain in the same type."


def steps_table(rows):
    def against(family, figure):
        """The best of a family, in either layout, over the row."""
        chosen = [row for row in rows if row["implementation"].removesuffix("-channels-last") == family]
        best = min((row[figure] for row in chosen if row.get(figure)), default=None)
        return lambda row: best / row[figure] if best and row.get(figure) else None

    columns = [
        Column("implementation", label),
        Column("ms", "seconds", "{:.2f}", 1e3),
        quantiles_column(2, alone="alone"),
        Column("faster", against("plain", "seconds"), "{:.2f}x"),
        Column("than ckpt", against("checkpoint", "seconds"), "{:.2f}x"),
        Column("peak MB", "peak_bytes", "{:.0f}", 1 / MB),
        Column("less", against("plain", "peak_bytes"), "{:.2f}x"),
        Column("than ckpt", against("checkpoint", "peak_bytes"), "{:.2f}x"),
        Column("kept MB", "kept_bytes", "{:.0f}", 1 / MB),
        Column("reserved MB", "reserved_bytes", "{:.0f}", 1 / MB),
        Column("launches", "launches"),
        Column("busy ms", "busy_seconds", "{:.2f}", 1e3),
        Column("warm-up s", "warm_up_seconds", "{:.1f}"),
    ]

    def failure(row):
        return None if "seconds" in row else [label(row), row.get("error", "not measured")[:60]]

    return table_of(columns, rows, failure)


def label(row):
    return IMPLEMENTATIONS[row["implementation"]].label


def kernels_text(rows, ceilings):
    text = ""
    if ceilings:
        products = ", ".join(f"{dtype} {rate / 1e12:.0f} TFLOP/s" for dtype, rate in ceilings["products"].items())
        text = f"Ceilings measured here: copy {ceilings['bandwidth'] / 1e9:.0f} GB/s; matrix product {products}."
    columns = [
        Column("op", "op"),
        Column("layer", "case"),
        Column("dtype", "dtype"),
        Column("us", "seconds", "{:.1f}", 1e6),
        quantiles_column(1, 1e6),
        Column("host us", "host_seconds", "{:.0f}", 1e6),
        Column("MB", "bytes", "{:.1f}", 1 / MB),
        Column("GB/s", lambda row: row["bytes"] / row["seconds"] / 1e9, "{:.0f}"),
        Column("TFLOP/s", lambda row: row["flops"] / row["seconds"] / 1e12, "{:.1f}"),
        Column("floor us", "floor_seconds", "{:.1f}", 1e6),
        Column("of floor", "of_floor", "{:.0f} %", 100),
        Column("bound", "bound"),
    ]

    def failure(row):
        return None if "seconds" in row else [row["op"], row["case"], row["dtype"], row.get("error", "")[:60]]

    return paragraphs(text, table_of(columns, rows, failure), KERNEL_NOTES)


def checks_text(found):
    lines = []
    if build := found.get("build"):
        lines.append(f"- build: {outcome(build, 'built')}")
    if tests := found.get("tests"):
        counts = ", ".join(f"{tests[name]} {name}" for name in ("passed", "failed", "skipped") if name in tests)
        lines.append(f"- tests: {outcome(tests, 'all passed')}; {counts}")
        lines += [f"  - {name}" for name in tests.get("failures", [])[:20]]
    for tool, summary in (found.get("sanitizer") or {}).items():
        if isinstance(summary, dict):
            said = summary.get("said") or outcome(summary, "no summary")
            ended = f"{said} ({summary.get('tests') or 'no test ended'})"
            lines.append(f"- compute-sanitizer {tool}: {summary.get('skipped') or ended}")
    for key, compiled in (found.get("compile") or {}).items():
        seconds = f"{compiled.get('seconds', 0):.0f} s"
        lines.append(f"- {key}: {compiled.get('error', seconds)}")
    return "\n".join(lines)


def outcome(found, good):
    if isinstance(found.get("skipped"), str):
        return found["skipped"]
    if found.get("out_of_time"):
        return f"out of time after {found['seconds']:.0f} s"
    state = good if found["status"] == 0 else f"failed with status {found['status']}"
    note = f" ({found['note']})" if "note" in found else ""
    return f"{state} in {found['seconds']:.0f} s{note}"
