"""The pictures of the benchmarks: matplotlib, no window, small files."""

import contextlib

import matplotlib

from bench import MB
from bench.implementations import IMPLEMENTATIONS
from bench.speed.report import ALLOCATORS

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  after the choice of the backend
from matplotlib.ticker import LogLocator, NullLocator  # noqa: E402

COLORS = {
    "plain": "#8c8c8c",
    "torchvision": "#6a6a6a",
    "checkpoint": "#e0a030",
    "selective": "#b5651d",
    "compile": "#2e8b57",
    "fused": "#1f77b4",
}
OTHER = "#b8b8b8"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "axes.titlesize": 11}


def _label(row):
    return IMPLEMENTATIONS[row["implementation"]].label


def _color(implementation):
    return COLORS.get(implementation.split("-")[0], OTHER)


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
    allocators = list(dict.fromkeys(row["allocator"] for row in rows))
    with _picture(path, len(allocators), (8.4 * len(allocators), 5.0), sharex=True, sharey=True) as (figure, panels):
        for axes, allocator in zip(panels, allocators, strict=True):
            markers = {color: iter("osD^v<>PX*pHdh8") for color in (*COLORS.values(), OTHER)}
            for r in (r for r in rows if r["allocator"] == allocator):
                color, seconds = _color(r["implementation"]), r["seconds"]
                spread = [[seconds - r.get("seconds_20", seconds)], [r.get("seconds_80", seconds) - seconds]]
                style = {"color": color, "fmt": next(markers[color]), "markersize": 6, "lw": 1, "label": _label(r)}
                hollow = {"markerfacecolor": "white"} if r["layout"] == "channels last" else {}
                axes.errorbar(r["peak_bytes"] / MB, seconds, spread, **style, **hollow)
            axes.set(xscale="log", yscale="log", xlabel="peak MB of a step")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_minor_locator(NullLocator())
                axis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.25)
            axes.set_title(ALLOCATORS[allocator], loc="left")
            axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        panels[0].set_ylabel("seconds of a step")
        _lay_out(figure, results, f"{first['title']} (hollow: channels last)")


PLOTS = {"memory": plot_memory, "scaling": plot_scaling, "speed": plot_speed}
