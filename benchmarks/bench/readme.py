"""The chart and the table at the top of README.md, from results that were measured earlier.

The chart goes to benchmarks/results/training-step.png. The other implementations stand in the faster of the memory formats
that were measured of them. The fused one stands on a CPU as it is without further settings.
"""

import json
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).resolve().parents[1] / "results"
CHART = RESULTS / "training-step.png"
COLORS = {"plain": "#8c8c8c", "checkpoint": "#e0a030", "torch.compile": "#2e8b57", "fused": "#1f77b4"}


class Network(NamedTuple):
    name: str
    setting: str
    file: str  # below RESULTS
    rows: str  # key of the rows in that file
    match: dict[str, object]  # values that the rows of this network have
    implementations: tuple[str | None, ...]  # names there, in the order of COLORS; None: not measured


_CPU = ("plain-channels-last", "checkpoint-channels-last", "compile-channels-last", "fused")
_CPU_FILE = ("xeon-2-cores/speed.json", "rows")
_GPU = ("plain-channels-last", None, "compile-channels-last", "fused-channels-last")
_GPU_FILE = ("nvidia-h200/gpu.json", "steps")
_CIFAR, _CPU_121 = {"workload": "cifar"}, {"workload": "densenet121"}
_GPU_121 = {"net": "densenet121", "dtype": "bfloat16", "batch_size": 256}
NETWORKS = (
    Network("DenseNet-BC(100, k=12)", "64 images of 32x32, float32, two CPU cores", *_CPU_FILE, _CIFAR, _CPU),
    Network("DenseNet-121", "8 images of 224x224, float32, two CPU cores", *_CPU_FILE, _CPU_121, _CPU),
    Network("DenseNet-121", "256 images of 224x224, bfloat16, one H200", *_GPU_FILE, _GPU_121, _GPU),
)


def figures(network: Network) -> list[tuple[float, float] | None]:
    """Return milliseconds and peak MB of a training step by implementation, None where it was not measured."""
    rows = json.loads((RESULTS / network.file).read_text())[network.rows]
    rows = [row for row in rows if all(row[key] == value for key, value in network.match.items())]
    measured = {row["implementation"]: (1e3 * row["seconds"], row["peak_bytes"] / 1e6) for row in rows}
    return [name and measured[name] for name in network.implementations]


def table() -> str:
    """Return the table as Markdown."""
    lines = ["| a training step of | " + " | ".join(COLORS) + " |", "| --- |" + " ---: |" * len(COLORS)]
    for network in NETWORKS:
        *others, fused = map(_cell, figures(network))
        lines.append(f"| {network.name}, {network.setting} | {' | '.join(others)} | **{fused}** |")
    return "\n".join(lines) + "\n"


def _cell(pair: tuple[float, float] | None) -> str:
    if pair is None:
        return "–"
    milliseconds, megabytes = pair
    return f"{milliseconds:.{1 if milliseconds < 100 else 0}f} ms, {megabytes:.0f} MB"


def draw(path: Path) -> None:
    """Draw time and peak memory as percentages of the plain network's, and write the picture to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.spines.bottom": False, "font.size": 9}
    with plt.rc_context(style):
        figure, panels = plt.subplots(1, 2, figsize=(9, 4.2), sharey=True)
        for panel, index, quantity in ((panels[0], 1, "peak memory"), (panels[1], 0, "time")):
            for group, network in enumerate(NETWORKS):
                _draw_group(panel, group, [pair and pair[index] for pair in figures(network)])
            panel.set_title(f"{quantity} of a training step, % of plain", loc="left", fontsize=10)
            panel.set(xlim=(0, 130), xticks=[], yticks=range(len(NETWORKS)))
            panel.tick_params(axis="y", length=0)
        panels[0].set_yticklabels([f"{n.name}\n" + n.setting.replace(", ", "\n", 1) for n in NETWORKS])
        panels[0].invert_yaxis()
        handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
        figure.legend(handles, COLORS, loc="lower center", ncols=len(COLORS), frameon=False)
        figure.tight_layout(rect=(0, 0.06, 1, 1))
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _draw_group(panel, group: int, values: list[float | None]) -> None:
    """Draw the bars of one network around the height `group`."""
    for i, (value, color) in enumerate(zip(values, COLORS.values(), strict=True)):
        height = group + 0.2 * (i - 1.5)
        if value is None:
            panel.text(1, height, "not measured", va="center", fontsize=8, color="#666666")
            continue
        percent = 100 * value / values[0]
        panel.barh(height, percent, 0.18, color=color)
        fused = color == COLORS["fused"]
        panel.text(percent + 1, height, f"{percent:.0f} %", va="center", fontweight="bold" if fused else "normal")
