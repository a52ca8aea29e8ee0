"""The pictures of the benchmarks: matplotlib, no window, small files."""

import matplotlib
from harness import MB

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  after the choice of the backend

COLOURS = {"plain": "#8c8c8c", "checkpoint": "#e0a030", "fused": "#1f77b4"}
NAMES = {
    "plain": "plain",
    "plain-channels-last": "plain, channels last",
    "checkpoint": "torch.utils.checkpoint",
    "checkpoint-channels-last": "checkpoint, channels last",
    "fused": "fused",
    "fused-kept": "fused, bottlenecks kept",
    "torchvision": "torchvision",
    "torchvision-efficient": "torchvision, memory_efficient",
}
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
