"""The pictures of the benchmarks: matplotlib, no window, small files."""

import contextlib

import matplotlib

from bench import MB
from bench.implementations import IMPLEMENTATIONS
from bench.speed.report import ALLOCATORS

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  after the choice of the backend
from matplotlib.text import Text  # noqa: E402
from matplotlib.ticker import LogLocator, NullLocator  # noqa: E402

COLORS = {
    "plain": "#8c8c8c",
    "torchvision": "#6a6a6a",
    "checkpoint": "#e0a030",
    "selective": "#b5651d",
    "compile": "#2e8b57",
    "fused": "#1f77b4",
}
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "axes.titlesize": 11}


def _label(row):
    return IMPLEMENTATIONS[row["implementation"]].label


def _color(implementation):
    family = implementation.split("-")[0]
    return COLORS.get(family, "#b8b8b8")


@contextlib.contextmanager
def _picture(path, panels, size, **sharing):
    """A figure with panels side by side, written to `path` at the end."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, panels, figsize=size, squeeze=False, **sharing)
        yield figure, axes[0]
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _lay_out(figure, results, title=None):
    """Write the title above and the machine below, and fit the panels between them."""
    d = results["machine"]
    where = d["cpu"] if d["device"] == "cpu" else d["device"]
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    text = f"{where}, {d['threads']} thread(s), torch {d['torch']}, {d['date']}"
    figure.text(0.99, 0.01, text, ha="right", va="bottom", fontsize=7, color="#666666")
    figure.tight_layout(rect=(0, 0.03, 1, 1))


def plot_memory(results, path):
    """Two rows of bars for the last variant: peak memory and time of a training step, one bar an implementation."""
    rows = [row for row in results["rows"] if row["variant"] == results["rows"][-1]["variant"]]
    first, names, colors = rows[0], [_label(r) for r in rows], [_color(r["implementation"]) for r in rows]
    peaks, seconds = [r["peak_bytes"] / MB for r in rows], [r["seconds"] for r in rows]
    spread = [[r["seconds"] - r["seconds_20"] for r in rows], [r["seconds_80"] - r["seconds"] for r in rows]]
    with _picture(path, 2, (9, 0.42 * len(rows) + 1.4), sharey=True) as (figure, (left, right)):
        left.barh(names, peaks, color=colors)
        right.barh(names, seconds, color=colors, xerr=spread, error_kw={"ecolor": "#444444", "lw": 1})
        left.set_title("peak memory of a training step (MB)", loc="left")
        right.set_title("time of a training step (s)", loc="left")
        left.invert_yaxis()
        ends = [r["seconds_80"] for r in rows]
        for axes, values, bars, form in ((left, peaks, peaks, "{:.0f}"), (right, seconds, ends, "{:.2f}")):
            for i, (value, end) in enumerate(zip(values, bars, strict=True)):
                axes.text(end + 0.015 * max(bars), i, form.format(value), va="center", fontsize=9)
            axes.set_xlim(0, 1.13 * max(bars))
            axes.tick_params(axis="y", length=0)
        size = f"batch {first['batch_size']}, {first['size']}x{first['size']}, {first['dtype']}"
        network = f"DenseNet-BC({first['depth']}, k={first['growth_rate']}) {first['variant']}"
        _lay_out(figure, results, f"{network}, {size}")


def plot_scaling(results, path):
    """Peak against depth and growth rate, both axes logarithmic; the fitted exponents in the legend."""
    with _picture(path, 2, (9, 3.6)) as (figure, panels):
        for axes, what in zip(panels, ("depth", "growth_rate"), strict=True):
            chosen = [r for r in results["rows"] if r["against"] == what]
            for name in dict.fromkeys(r["implementation"] for r in chosen):
                line = [r for r in chosen if r["implementation"] == name]
                text = f"{_label(line[0])}: exponent {line[0]['exponent']:.2f}"
                x, y = [r[what] for r in line], [r["peak_bytes"] / MB for r in line]
                axes.plot(x, y, "o-", color=_color(name), markersize=4, label=text)
            other = "growth_rate" if what == "depth" else "depth"
            fixed = f"({other.replace('_', ' ')} {chosen[0][other]})"
            axes.set(xscale="log", yscale="log", xlabel=f"{what.replace('_', ' ')} {fixed}")
            axes.set_xticks(sorted({r[what] for r in chosen}), sorted({r[what] for r in chosen}))
            axes.minorticks_off()
            axes.legend(frameon=False, fontsize=8)
        panels[0].set_ylabel("peak MB of a training step")
        _lay_out(figure, results)


def plot_speed(results, path):
    """Time against peak memory, one point an implementation, one panel an allocator: the first workload of the results."""
    first = results["rows"][0]
    rows = [r for r in results["rows"] if "error" not in r and r["workload"] == first["workload"]]
    groups = {}
    for row in rows:
        groups.setdefault(row["allocator"], []).append(row)
    with _picture(path, len(groups), (7.0 * len(groups), 5.6), sharex=True, sharey=True) as (figure, panels):
        for axes, (allocator, group) in zip(panels, groups.items(), strict=True):
            _points(axes, group)
            axes.set_title(ALLOCATORS[allocator], loc="left")
        x, y = [r["peak_bytes"] / MB for r in rows], [r["seconds"] for r in rows]
        axes.set(xlim=(0.8 * min(x), 3 * max(x)), ylim=(0.7 * min(y), 1.4 * max(y)))
        panels[0].set_ylabel("seconds of a step")
        _lay_out(figure, results, f"{first['title']} (hollow: channels last)")
        for axes, group in zip(panels, groups.values(), strict=True):
            _name_points(figure, axes, group)


PLOTS = {"memory": plot_memory, "scaling": plot_scaling, "speed": plot_speed}


def _points(axes, rows):
    for r in rows:
        color, filled = _color(r["implementation"]), r["layout"] == "contiguous"
        spread = [
            [r["seconds"] - r.get("seconds_20", r["seconds"])],
            [r.get("seconds_80", r["seconds"]) - r["seconds"]],
        ]
        style = {"color": color, "markersize": 6, "lw": 1, "markerfacecolor": color if filled else "white"}
        axes.errorbar(r["peak_bytes"] / MB, r["seconds"], spread, fmt="o", **style)
    axes.set(xscale="log", yscale="log", xlabel="peak MB of a step")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25)


def _name_points(figure, axes, rows):
    """A name at each point, in the nearest place that no other name and no point is in."""
    renderer, taken = figure.canvas.get_renderer(), []
    points = [axes.transData.transform((r["peak_bytes"] / MB, r["seconds"])) for r in rows]
    places = [(x, y * sign) for y in range(0, 240, 6) for x in (9, -9, 30, -30) for sign in (1, -1)]
    for row in sorted(rows, key=lambda r: (not r["implementation"].startswith("fused"), r["seconds"])):
        fused, color = row["implementation"].startswith("fused"), _color(row["implementation"])
        text = axes.annotate(
            _label(row).removesuffix(", channels last"),
            (row["peak_bytes"] / MB, row["seconds"]),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8,
            va="center",
            color=color,
            fontweight="bold" if fused else "normal",
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.5, "alpha": 0.6, "shrinkB": 3},
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
