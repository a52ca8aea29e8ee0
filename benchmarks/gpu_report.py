"""The results of gpu.py as tables, and as the files that hold them.

Where the build failed there still are results to write: nothing here needs the library before there is a table.
"""

import json
import os
from pathlib import Path

from roofline import FORMULAS

MB = 1e6
NAMES = {
    "plain": "plain",
    "plain-channels-last": "plain, channels last",
    "checkpoint": "torch.utils.checkpoint",
    "checkpoint-channels-last": "checkpoint, channels last",
    "compile": "torch.compile, channels last",
    "plain-graph": "plain, channels last, CUDA graph",
    "fused": "fused",
    "fused-channels-last": "fused, images channels last",
    "fused-kept": "fused, bottlenecks kept, images channels last",
    "fused-graph": "fused, images channels last, CUDA graph",
}
AGREEMENT = {
    "plain": "plain",
    "fused": "fused",
    "fused-kept": "fused with bottlenecks kept",
    "masked": "fused with masks",
}
NETS = {"cifar": "DenseNet-BC(100, k=12)", "densenet121": "DenseNet-121"}


def write(path, results):
    """The JSON file and the Markdown file beside it; each is replaced whole, so that a killed run leaves both readable."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, json.dumps(results, indent=1) + "\n")
    _replace(path.with_suffix(".md"), markdown(results))


def _replace(path, text):
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    os.replace(beside, path)


def markdown(results):
    """Everything, in the order in which it was done."""
    where = results.get("machine", {})
    title = f"# Training on {where.get('name', 'a GPU')}"
    sections = [title, heading(where).replace("\n", "  \n"), *(text for _, text in sections_of(results))]
    return "\n\n".join(s for s in sections if s) + "\n"


def heading(where):
    """What was measured on, as lines of text."""
    if "torch" not in where:  # the library could not be loaded
        return ""
    import machine

    return machine.heading(where) + (
        f"\ndriver {where['driver']}, compute capability {where['capability']}, {where['multiprocessors']} "
        f"multiprocessors, L2 cache {where['l2_mb']} MB; cudnn.benchmark {where['cudnn_benchmark']}, TF32: {where['tf32']}"
    )


def table(header, rows):
    import machine

    return machine.table(header, rows)


def sections_of(results):
    """(name, text) of every part that has anything to show."""
    sections = []
    if results.get("targets"):
        sections.append(("targets", "## Targets\n\n" + targets_table(results["targets"])))
    if results.get("steps"):
        sections.append(
            ("steps", "## Training steps\n\n" + steps_tables(results["steps"], results.get("agreement", {})))
        )
    if results.get("kernels"):
        sections.append(("kernels", "## Kernels\n\n" + kernels_text(results["kernels"], results.get("ceilings"))))
    checks = checks_text(results)
    if checks:
        sections.append(("checks", "## Build and tests\n\n" + checks))
    if results.get("notes"):
        sections.append(("notes", "## Notes\n\n" + "\n".join(f"- {note}" for note in results["notes"])))
    return sections


def targets_table(targets):
    rows = [
        [
            t["name"],
            t["wanted"],
            "" if t["found"] is None else f"{t['found']:.2f}",
            {True: "reached", False: "MISSED"}.get(t["reached"], "not measured"),
        ]
        for t in targets
    ]
    return table(["target", "wanted", "found", ""], rows)


def steps_tables(rows, agreement):
    """A table for each network, type and batch size."""
    groups, texts = dict.fromkeys((r["net"], r["dtype"], r["batch_size"]) for r in rows), []
    for net, dtype, batch in groups:
        chosen = [r for r in rows if (r["net"], r["dtype"], r["batch_size"]) == (net, dtype, batch)]
        first = chosen[0]
        title = f"{NETS[net]} {first['variant']}, batch {batch}, {first['size']}x{first['size']}, {dtype}"
        found = agreement.get(f"{net} {dtype} {batch} agreement")
        texts.append("\n\n".join(filter(None, [f"### {title}", agreement_text(found), steps_table(chosen)])))
    notes = (
        "ms a step: median and 20-80 % quantiles of interleaved steps, device time from an idle device. Peak: over "
        "parameters, gradients and momentum; reserved: what the allocator took for it; kept: what lives from forward to "
        "backward. Faster and less are against the plain network in the better of its layouts, and against the "
        "checkpointed one. Launches: kernels in one step; busy: how long they ran; counted at the end, without cuDNN's "
        "search for algorithms."
    )
    return "\n\n".join([*texts, notes])


def agreement_text(found):
    if not found:
        return ""
    if "error" in found:
        return f"Gradients could not be compared: {found['error']}"
    errors = {name: f"{found[name]['outputs']:.1e} and {found[name]['gradients']:.1e}" for name in AGREEMENT}
    listed = ", ".join(f"{AGREEMENT[name]} {text}" for name, text in errors.items())
    verdict = "agree" if found["agrees"] else "DISAGREE"
    return f"Outputs and gradients {verdict}; relative errors against float64: {listed} against plain in the same type."


def steps_table(rows):
    header = ["implementation", "ms", "20-80 %", "faster", "than ckpt", "peak MB", "less", "than ckpt"]
    header += ["kept MB", "reserved MB", "launches", "busy ms", "warm-up s"]
    best = {
        (family, figure): min(
            (r[figure] for r in rows if r["implementation"].removesuffix("-channels-last") == family and r.get(figure)),
            default=None,
        )
        for family in ("plain", "checkpoint")
        for figure in ("seconds", "peak_bytes")
    }
    cells = []
    for row in rows:
        name = NAMES[row["implementation"]]
        if "seconds" not in row:
            cells.append([name, row.get("error", "not measured")[:60], *[""] * (len(header) - 2)])
            continue
        ratios = {
            key: f"{value / row[key[1]]:.2f}x" if value and row.get(key[1]) else "" for key, value in best.items()
        }
        spread = "alone" if not row["rounds"] else f"{row['seconds_20'] * 1e3:.2f}-{row['seconds_80'] * 1e3:.2f}"
        cells.append(
            [
                name,
                f"{row['seconds'] * 1e3:.2f}",
                spread,
                ratios["plain", "seconds"],
                ratios["checkpoint", "seconds"],
                megabytes(row.get("peak_bytes")),
                ratios["plain", "peak_bytes"],
                ratios["checkpoint", "peak_bytes"],
                megabytes(row.get("kept_bytes")),
                megabytes(row.get("reserved_bytes")),
                str(row.get("launches", "")),
                f"{row['busy_seconds'] * 1e3:.2f}" if "busy_seconds" in row else "",
                f"{row['warm_up_seconds']:.1f}" if "warm_up_seconds" in row else "",
            ]
        )
    return table(header, cells)


def megabytes(value):
    return "" if value is None else f"{value / MB:.0f}"


def kernels_text(rows, ceilings):
    parts = []
    if ceilings:
        products = ", ".join(f"{dtype} {rate / 1e12:.0f} TFLOP/s" for dtype, rate in ceilings["products"].items())
        parts.append(f"Ceilings measured here: copy {ceilings['bandwidth'] / 1e9:.0f} GB/s; matrix product {products}.")
    parts.append(kernels_table(rows))
    formulas = "; ".join(f"{op} {formula}" for op, formula in FORMULAS.items())
    parts.append(
        "us: median of calls whose data is not in the L2 cache; host us: what queuing one takes. Of floor: the longer of "
        "bytes / copy bandwidth and operations / product rate, over the time.\n"
        f"Bytes, e a stored value, a = 4: {formulas}."
    )
    return "\n\n".join(parts)


def kernels_table(rows):
    header = [
        "op",
        "layer",
        "dtype",
        "us",
        "20-80 %",
        "host us",
        "MB",
        "GB/s",
        "TFLOP/s",
        "floor us",
        "of floor",
        "bound",
    ]
    cells = []
    for r in rows:
        if "seconds" not in r:
            cells.append([r["op"], r["case"], r["dtype"], r.get("error", "")[:60], *[""] * (len(header) - 4)])
            continue
        cells.append(
            [
                r["op"],
                r["case"],
                r["dtype"],
                f"{r['seconds'] * 1e6:.1f}",
                f"{r['seconds_20'] * 1e6:.1f}-{r['seconds_80'] * 1e6:.1f}",
                f"{r['host_seconds'] * 1e6:.0f}",
                f"{r['bytes'] / MB:.1f}",
                f"{r['bytes'] / r['seconds'] / 1e9:.0f}",
                f"{r['flops'] / r['seconds'] / 1e12:.1f}",
                f"{r['floor_seconds'] * 1e6:.1f}",
                f"{100 * r['of_floor']:.0f} %",
                r["bound"],
            ]
        )
    return table(header, cells)


def checks_text(results):
    lines = []
    if build := results.get("build"):
        lines.append(f"- build: {outcome(build, 'built')}")
    if tests := results.get("tests"):
        counts = ", ".join(f"{tests[name]} {name}" for name in ("passed", "failed", "skipped") if name in tests)
        lines.append(f"- tests: {outcome(tests, 'all passed')}; {counts}")
        lines += [f"  - {name}" for name in tests.get("failures", [])[:20]]
    for tool, found in (results.get("sanitizer") or {}).items():
        if isinstance(found, dict):
            text = (
                found.get("skipped")
                or f"{found['said'] or outcome(found, 'no summary')} ({found['tests'] or 'no test ended'})"
            )
            lines.append(f"- compute-sanitizer {tool}: {text}")
    compiled = results.get("compile") or {}
    for key, found in compiled.items():
        said = found.get("error") or f"{found['seconds']:.0f} s"
        lines.append(f"- {key}: {said}")
    return "\n".join(lines)


def outcome(found, good):
    if "skipped" in found and isinstance(found["skipped"], str):
        return found["skipped"]
    if found.get("out_of_time"):
        return f"out of time after {found['seconds']:.0f} s"
    state = good if found["status"] == 0 else f"failed with status {found['status']}"
    note = f" ({found['note']})" if "note" in found else ""
    return f"{state} in {found['seconds']:.0f} s{note}"
