"""The results of speed.py as tables, and the targets beside them."""

from gpu_targets import Target
from limits import describe
from machine import table
from speed_steps import FLOAT32, PEERS

MB = 1e6
TITLES = {"default": "default malloc", "keep-pages": "malloc that keeps its pages"}
# least times that fused, and fused with bottlenecks kept, shall be faster than the fastest peer
FASTER = {
    "default": {"cifar": (3.0, 3.3), "cifar-ab": (3.0, 3.3), "densenet121": (1.8, None), "bc190": (1.8, None)},
    "keep-pages": {"cifar": (2.4, 2.7), "cifar-ab": (2.4, 2.7), "densenet121": (1.5, None), "bc190": (1.5, None)},
}
INFERENCE = {"default": 1.5, "keep-pages": None}  # with a malloc that keeps its pages none was set
RESTRICTED = 1.5  # training, all with AVX2 alone
OF_ARITHMETIC, PEAK_MB = 1.7, {"cifar": 150, "cifar-ab": 150}


def rows_of(found):
    """Rows of all allocators, each with how many times as fast as the fastest peer of its table it is."""
    rows, peers = [], [*PEERS, *FLOAT32]
    for allocator, findings in found.items():
        names = list(dict.fromkeys(row.get("workload") for row in findings.rows.values()))
        chosen = [{"allocator": allocator} | row for row in findings.rows.values() if "implementation" in row]
        for row in chosen:
            if fastest := fastest_peer(chosen, row["workload"]):
                row["faster"] = fastest["seconds"] / row["seconds"] if row.get("seconds") else None
        rows += sorted(chosen, key=lambda row: (names.index(row["workload"]), peers.index(row["implementation"])))
    return rows


def fastest_peer(rows, workload, allocator=None):
    peers = [
        r
        for r in rows
        if r["workload"] == workload
        and r["allocator"] == (allocator or r["allocator"])
        and not r["implementation"].startswith("fused")
        and r.get("rounds")
    ]
    return min(peers, key=lambda r: r["seconds"], default=None)


def targets(rows, capability=None, dtype="float32"):
    """What is to be reached, as dicts; those of another type or of a lesser processor in place of the ordinary ones, which
    are those of AVX-512."""
    lesser = capability not in (None, "avx512")
    found = {(r["allocator"], r["workload"], r["implementation"]): r for r in rows if r.get("rounds")}
    listed = []

    def figure(allocator, workload, name, key):
        return found.get((allocator, workload, name), {}).get(key)

    for allocator, workload in dict.fromkeys((r["allocator"], r["workload"]) for r in rows):
        title = f"{workload}, {TITLES[allocator]}"
        fastest = fastest_peer(rows, workload, allocator)
        against = f"{title}: {{}} against the fastest peer" + (f", {fastest['implementation']}" if fastest else "")
        least = FASTER[allocator].get(workload, (INFERENCE[allocator], None))
        training = not workload.endswith("-inference")
        least = (RESTRICTED if training else None, None) if lesser else least
        least = (1.0 if training else None, None) if dtype != "float32" else least
        for name, wanted in zip(("fused", "fused-kept"), least, strict=True):
            if name == "fused" or figure(allocator, workload, name, "faster"):
                listed.append(at_least(against.format(name), wanted, figure(allocator, workload, name, "faster")))
        if not training:
            continue
        if dtype != "float32":
            pair = [figure(allocator, workload, name, "seconds") for name in ("fused-float32", "fused")]
            listed.append(
                at_least(f"{title}: fused against fused float32", 1.0, pair[0] / pair[1] if all(pair) else None)
            )
        elif not lesser:
            name = f"{title}: fused over the arithmetic's time"
            listed.append(Target.at_most(name, OF_ARITHMETIC, figure(allocator, workload, "fused", "of_arithmetic")))
            peak = figure(allocator, workload, "fused", "peak_bytes")
            if workload in PEAK_MB:
                listed.append(Target.at_most(f"{title}: fused peak MB", PEAK_MB[workload], peak and peak / MB))
    return [{"name": t.name, "wanted": t.wanted, "found": t.found, "verdict": t.verdict} for t in listed]


def at_least(name, wanted, found):
    """A target; one without a limit is only shown."""
    return Target(name, "", found, None) if wanted is None else Target.at_least(name, wanted, found)


def flat(rows):
    """Rows of one and the same columns, for CSV."""
    rows = [{k: v for k, v in row.items() if not isinstance(v, dict)} for row in rows]
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in columns} for row in rows]


def markdown(rows, found, targets):
    """All tables, then the summary."""
    parts = []
    for allocator, workload in dict.fromkeys((r["allocator"], r["workload"]) for r in rows):
        chosen = [r for r in rows if (r["allocator"], r["workload"]) == (allocator, workload)]
        facts = found[allocator].facts
        parts.append(f"## {chosen[0]['title']}, {TITLES[allocator]}")
        if rates := facts.get(f"rates {workload}"):
            parts.append(f"Limits measured between the steps: {describe(rates)}.")
        parts.append(_table(chosen))
        if remarks := _remarks(chosen, facts.get(f"left out {workload}", {})):
            parts.append("\n".join(f"- {text}" for text in remarks))
    parts += ["## Notes", NOTES, *(n for findings in found.values() for n in findings.notes)]
    parts += ["## Summary", _summary(targets)]
    return "\n\n".join(parts)


NOTES = """\
ms: median of interleaved steps, with 20 and 80 % quantiles; of it forward (with the loss), backward, optimizer, each a
median. faster: than the fastest implementation that is not this package's. peak MB: over parameters, gradients and
momentum, workspaces included. x arithmetic: times what the plain network's convolutions, computed directly, take at the
rate of the matrix product; x bytes: times what the fused network's reads and writes take at the rate of the copy. first:
seconds of the first step, where it is compiled; with the second allocator the compiler finds its earlier results.
Compared before: outputs and gradients of each peer in the step that is timed, with the plain network's under the same
weights, data and masks; those of eager peers on two images in float64 too, to 1e-9."""


def _table(rows):
    training = rows[0]["training"]
    header = ["implementation", "layout", "ms", "20-80 %"] + ["forward", "backward", "optimizer"] * training
    header += ["faster", "peak MB", "x arithmetic", "x bytes", "first"]
    cells = []
    for r in rows:

        def cell(key, form, scale=1.0, r=r):
            return "" if r.get(key) is None else form.format(r[key] * scale)

        if "error" in r:
            cells.append([r["implementation"], r["layout"], "out of time" if r["error"] == "out of time" else "failed"])
            cells[-1] += [""] * (len(header) - 3)
            continue
        spread = f"{r['seconds_20'] * 1e3:.1f}-{r['seconds_80'] * 1e3:.1f}" if r.get("rounds") else "not interleaved"
        line = [r["implementation"], r["layout"], cell("seconds", "{:.1f}", 1e3), spread]
        line += (
            [cell(f"{part}_seconds", "{:.1f}", 1e3) for part in ("forward", "backward", "optimizer")]
            if training
            else []
        )
        line += [cell("faster", "{:.2f}x"), cell("peak_bytes", "{:.1f}", 1 / MB), cell("of_arithmetic", "{:.2f}")]
        line += [cell("of_bytes", "{:.2f}"), cell("warm_up_seconds", "{:.0f}") if r["compiled"] else ""]
        cells.append(line)
    return table(header, cells)


def _remarks(rows, left_out):
    remarks = [f"{r['implementation']}: {r['error']}" for r in rows if "error" in r]
    for r in rows:
        error = max(r.get(kind, {}).get("running statistics", 0.0) for kind in ("errors", "float64_errors"))
        if error > 1e-3:
            remarks.append(f"{r['implementation']}: running statistics differ from the plain network's by {error:.0e}")
    reasons = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    return remarks + [f"left out: {', '.join(names)}: {reason}" for reason, names in reasons.items()]


def _summary(targets):
    cells = [
        [t["name"], t["wanted"], "" if t["found"] is None else f"{t['found']:.2f}", t["verdict"] if t["wanted"] else ""]
        for t in targets
    ]
    return table(["target", "wanted", "found", ""], cells)
