"""Records of a run: metrics.csv, TensorBoard, the progress bar, a line an epoch, curves, and summary.json."""

import csv
import io
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from training.checkpoint import replace_file
from training.cli import hold_signals
from training.errors import library
from training.model import implementation

# Losses are means of the cross entropy, accuracies percents, memory MB = 1e6 bytes; train_seconds is cumulative.
COLUMNS = (
    "epoch steps learning_rate train_loss train_accuracy validation_loss validation_accuracy "
    "images_per_second data_wait_percent peak_memory_mb train_seconds"
).split()
QUANTITIES = {"loss": "cross entropy", "accuracy": "accuracy in percent"}
SCALES = {"loss": "log", "accuracy": "linear"}  # the first epochs would hide the others

Rows = list[dict[str, float]]  # of metrics.csv


class Records:
    """Record the run in the main process; in the others every method does nothing.

    Args:
        folder: of the run.
        first_step: steps done before; what TensorBoard has of later ones belongs to a run that was cut off.
        total_steps: steps until the end.
        enabled: True in the main process.
    """

    def __init__(self, folder: Path, first_step: int, total_steps: int, enabled: bool):
        disable = None if enabled else True  # None: unless there is a terminal
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=disable, dynamic_ncols=True)
        self._writer = None
        if enabled:
            tensorboard = library("torch.utils.tensorboard")
            self._writer = tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def advance(self) -> None:
        """Advance the bar by one step."""
        self._bar.update()

    def steps(self, first: int, losses: list[float], learning_rate: float, postfix: dict[str, str]) -> None:
        """Write losses of the steps from number `first` on (the first of all is 1); `postfix` is shown beside the bar."""
        for step, loss in enumerate(losses, first):
            self._write({"train/loss": loss, "train/learning_rate": learning_rate}, step)
        self._bar.set_postfix(postfix, refresh=False)

    def epoch(self, row: dict[str, float], epochs: int) -> None:
        """Write the scalars of an epoch, wait until all events are on the disk, and print a line, above the bar if any."""
        self._write({f"epoch/{name}": row[name] for name in COLUMNS[3:]}, row["steps"])
        self.flush()
        if self._writer is not None:
            tqdm.write(
                f"epoch {row['epoch']}/{epochs}: "
                f"train loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.2f} %; "
                f"validation loss {row['validation_loss']:.4f}, accuracy {row['validation_accuracy']:.2f} %; "
                f"{row['images_per_second']:.0f} images/s, peak {row['peak_memory_mb']:.0f} MB"
            )

    def _write(self, scalars: dict[str, float], step: int) -> None:
        if self._writer is not None:
            with hold_signals():  # else the writer's queue could be left locked, and closing it would never end
                for name, value in scalars.items():
                    self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Wait until TensorBoard's events are on the disk."""
        if self._writer is not None:
            with hold_signals():
                self._writer.flush()

    def close(self) -> None:
        self._bar.close()
        if self._writer is not None:
            with hold_signals():
                self._writer.close()


def write_table(path: Path, rows: Rows) -> None:
    """Write metrics.csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, text.getvalue())


def summarize(trainer, test: dict[str, float]) -> dict:
    """Return the content of summary.json. Accuracies in percent, memory in MB = 1e6 bytes, the highest of all epochs.

    Args:
        trainer: after `train`.
        test: loss and accuracy of the best weights on the test split.
    """
    options, state = trainer.options, trainer.state
    seconds = state.rows[-1]["train_seconds"]
    return {
        **{
            name: getattr(options, name)
            for name in ("dataset", "variant", "depth", "growth_rate", "seed", "batch_size")
        },
        "efficient": implementation(trainer.model),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "processes": trainer.processes.world_size,
        "epochs": len(state.rows),
        "steps": state.step,
        "best_epoch": state.best["epoch"],
        **{f"validation_{name}": state.best[f"validation_{name}"] for name in QUANTITIES},
        **{f"test_{name}": test[name] for name in QUANTITIES},
        "peak_memory_mb": max(row["peak_memory_mb"] for row in state.rows),
        "train_seconds": seconds,
        "images_per_second": trainer.count_images(state.step) / seconds,
        "device": torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def draw_run(folder: Path, rows: Rows, title: str) -> None:
    """Draw loss.png and accuracy.png of one run: training and validation."""
    for quantity in QUANTITIES:
        draw(folder / f"{quantity}.png", quantity, {split: (rows, split) for split in ("train", "validation")}, title)


def draw(path: Path, quantity: str, curves: dict[str, tuple[Rows, str]], title: str) -> None:
    """Draw a quantity over the epochs, as the paper's figures 6 and 7 have it.

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
