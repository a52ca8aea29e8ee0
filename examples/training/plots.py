"""Loss and accuracy over the epochs, as the paper's figures 6 and 7 have them."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from training.files import replace_file

QUANTITIES = {"loss": "cross entropy", "accuracy": "accuracy in percent"}
SCALES = {"loss": "log", "accuracy": "linear"}  # the first epochs would hide the others


def draw_run(folder: Path, rows: list[dict[str, float]], title: str) -> None:
    """loss.png and accuracy.png of one run, from the rows of metrics.csv: training and validation."""
    for quantity in QUANTITIES:
        draw(folder / f"{quantity}.png", quantity, {split: (rows, split) for split in ("train", "validation")}, title)


def draw(path: Path, quantity: str, curves: dict[str, tuple[list[dict[str, float]], str]], title: str) -> None:
    """One figure.

    Args:
        path: of a PNG file, which is replaced as a whole.
        quantity: 'loss' or 'accuracy'.
        curves: by label, the rows of metrics.csv and 'train' or 'validation'.
        title: of the figure.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, (rows, split) in curves.items():
        points = [row["epoch"] for row in rows], [row[f"{split}_{quantity}"] for row in rows]
        axes.plot(*points, label=label, marker="." * (len(rows) < 50))
    axes.set(xlabel="epoch", ylabel=QUANTITIES[quantity], title=title, yscale=SCALES[quantity])
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150)
    replace_file(path, buffer.getvalue())
