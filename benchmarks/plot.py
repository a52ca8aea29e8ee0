"""The pictures of the benchmarks: matplotlib, no window, small files."""

import matplotlib
from harness import MB

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  after the choice of the backend
from matplotlib.text import Text  # noqa: E402
from matplotlib.ticker import LogLocator, NullLocator  # noqa: E402

COLOURS = {
    "plain": "#8c8c8c",
    "torchvision": "#6a6a6a",
    "checkpoint": "#e0a030",
    "selective": "#b5651d",
    "compile": "#2e8b57",
    "fused": "#1f77b4",
}
NAMES = {
    "plain": "plain",
    "plain-channels-last": "plain, channels last",
    "checkpoint": "torch.utils.checkpoint",
    "checkpoint-channels-last": "checkpoint, channels last",
    "selective": "selective checkpoint",
    "selective-channels-last": "selective checkpoint, channels last",
    "saved-on-cpu": "saved tensors on the CPU",
    "compile": "torch.compile",
    "compile-channels-last": "torch.compile, channels last",
    "compile-budget-0.5": "torch.compile, budget 0.5",
    "compile-budget-0.5-channels-last": "torch.compile, budget 0.5, channels last",
    "compile-budget-0.1": "torch.compile, budget 0.1",
    "compile-budget-0.1-channels-last": "torch.compile, budget 0.1, channels last",
    "compile-frozen": "torch.compile, frozen",
    "compile-frozen-channels-last": "torch.compile, frozen, channels last",
    "fused": "fused",
    "fused-channels-last": "fused, images channels last",
    "fused-kept": "fused, bottlenecks kept",
    "fused-compile": "fused under torch.compile",
    "fused-float32": "fused, float32",
    "torchvision": "torchvision",
    "torchvision-channels-last": "torchvision, channels last",
    "torchvision-efficient": "torchvision, memory_efficient",
    "torchvision-efficient-channels-last": "torchvision, memory_efficient, channels last",
}
ALLOCATORS = {"default": "default malloc", "keep-pages": "malloc that keeps its pages"}
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "axes.titlesize": 11}


def _colour(implementation):
    family = implementation.split("-")[0]
    return COLOURS.get(family, "#b8b8b8")


def _footer(figure, description):
    where = description["cpu"] if description["device"] == "cpu" else description["device"]
    text = f"{where}, {description['threads']} thread(s), torch {description['torch']}, {description['date']}"
    figure.text(0.99, 0.01, text, ha="right", va="bottom", fontsize=7, color="#666666")


def plot_memory(rows, description, path):
    """Two rows of bars for one variant: peak memory and time of a training step, one bar an implementation."""
    first, names = rows[0], [NAMES[r["implementation"]] for r in rows]
    colours = [_colour(r["implementation"]) for r in rows]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 0.42 * len(rows) + 1.4), sharey=True)
        peaks, seconds = [r["peak_bytes"] / MB for r in rows], [r["seconds"] for r in rows]
        spread = [[r["seconds"] - r["seconds_20"] for r in rows], [r["seconds_80"] - r["seconds"] for r in rows]]
        left.barh(names, peaks, color=colours)
        right.barh(names, seconds, color=colours, xerr=spread, error_kw={"ecolor": "#444444", "lw": 1})
        left.set_title("peak memory of a training step (MB)", loc="left")
        right.set_title("time of a training step (s)", loc="left")
        left.invert_yaxis()
        for axes, values, form in ((left, peaks, "{:.0f}"), (right, [r["seconds_80"] for r in rows], "{:.2f}")):
            shown = peaks if axes is left else seconds
            for i, (value, end) in enumerate(zip(shown, values, strict=True)):
                axes.text(end + 0.015 * max(values), i, form.format(value), va="center", fontsize=9)
            axes.set_xlim(0, 1.13 * max(values))
            axes.tick_params(axis="y", length=0)
        figure.suptitle(
            f"DenseNet-BC({first['depth']}, k={first['growth_rate']}) {first['variant']}, batch {first['batch_size']}, "
            f"{first['size']}x{first['size']}, {first['dtype']}",
            x=0.01,
            ha="left",
        )
        _footer(figure, description)
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        figure.savefig(path, dpi=110)
        plt.close(figure)


def plot_scaling(rows, description, path):
    """Peak against depth and growth rate, both axes logarithmic; the fitted exponents in the legend."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(9, 3.6))
        for axes, what in zip(panels, ("depth", "growth_rate"), strict=True):
            chosen = [r for r in rows if r["against"] == what]
            for name in dict.fromkeys(r["implementation"] for r in chosen):
                line = [r for r in chosen if r["implementation"] == name]
                text = f"{NAMES[name]}: exponent {line[0]['exponent']:.2f}"
                x, y = [r[what] for r in line], [r["peak_bytes"] / MB for r in line]
                axes.plot(x, y, "o-", color=_colour(name), markersize=4, label=text)
            other = "growth_rate" if what == "depth" else "depth"
            axes.set(
                xscale="log",
                yscale="log",
                xlabel=f"{what.replace('_', ' ')} ({other.replace('_', ' ')} {chosen[0][other]})",
            )
            axes.set_xticks(sorted({r[what] for r in chosen}), sorted({r[what] for r in chosen}))
            axes.minorticks_off()
            axes.legend(frameon=False, fontsize=8)
        panels[0].set_ylabel("peak MB of a training step")
        _footer(figure, description)
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        figure.savefig(path, dpi=110)
        plt.close(figure)


def plot_speed(rows, description, path):
    """Time against peak memory, one point an implementation, one panel an allocator: the first workload in `rows`."""
    rows = [r for r in rows if "error" not in r and r["workload"] == rows[0]["workload"]]
    allocators = list(dict.fromkeys(r["allocator"] for r in rows))
    with plt.rc_context(STYLE):
        size = 7.0 * len(allocators), 5.6
        figure, panels = plt.subplots(1, len(allocators), figsize=size, sharex=True, sharey=True, squeeze=False)
        for axes, allocator in zip(panels[0], allocators, strict=True):
            _points(axes, [r for r in rows if r["allocator"] == allocator])
            axes.set_title(ALLOCATORS[allocator], loc="left")
        x, y = [r["peak_bytes"] / MB for r in rows], [r["seconds"] for r in rows]
        axes.set(xlim=(0.8 * min(x), 3 * max(x)), ylim=(0.7 * min(y), 1.4 * max(y)))
        panels[0][0].set_ylabel("seconds of a step")
        figure.suptitle(f"{rows[0]['title']} (hollow: channels last)", x=0.01, ha="left")
        _footer(figure, description)
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        for axes, allocator in zip(panels[0], allocators, strict=True):
            _label(figure, axes, [r for r in rows if r["allocator"] == allocator])
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _points(axes, rows):
    for r in rows:
        colour, filled = _colour(r["implementation"]), r["layout"] == "contiguous"
        spread = [
            [r["seconds"] - r.get("seconds_20", r["seconds"])],
            [r.get("seconds_80", r["seconds"]) - r["seconds"]],
        ]
        style = {"color": colour, "markersize": 6, "lw": 1, "markerfacecolor": colour if filled else "white"}
        axes.errorbar(r["peak_bytes"] / MB, r["seconds"], spread, fmt="o", **style)
    axes.set(xscale="log", yscale="log", xlabel="peak MB of a step")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25)


def _label(figure, axes, rows):
    """A name at each point, in the nearest place that no other name and no point is in."""
    renderer, taken = figure.canvas.get_renderer(), []
    points = [axes.transData.transform((r["peak_bytes"] / MB, r["seconds"])) for r in rows]
    places = [(x, y * sign) for y in range(0, 240, 6) for x in (9, -9, 30, -30) for sign in (1, -1)]
    for row in sorted(rows, key=lambda r: (not r["implementation"].startswith("fused"), r["seconds"])):
        fused, colour = row["implementation"].startswith("fused"), _colour(row["implementation"])
        text = axes.annotate(
            NAMES[row["implementation"]].removesuffix(", channels last"),
            (row["peak_bytes"] / MB, row["seconds"]),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8,
            va="center",
            color=colour,
            fontweight="bold" if fused else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6, "shrinkB": 3},
        )
        for x, y in places:
            text.set_ha("left" if x > 0 else "right")
            text.set_position((x, y))
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # of an annotation it would contain the line too
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1
            clear = not any(box.x0 - 4 < px < box.x1 + 4 and box.y0 - 3 < py < box.y1 + 3 for px, py in points)
            if inside and clear and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
