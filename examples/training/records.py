"""What a run tells while it goes on: metrics.csv, TensorBoard, the progress bar and a line an epoch."""

import csv
import io
from pathlib import Path

from tqdm import tqdm

from training.files import replace_file
from training.libraries import library
from training.script import hold_signals

# Losses are means of the cross entropy, accuracies percents, memory MB = 1e6 bytes; train_seconds is cumulative.
COLUMNS = (
    *("epoch", "steps", "learning_rate", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy"),
    *("images_per_second", "data_wait_percent", "peak_memory_mb", "train_seconds"),
)


class Records:
    """Of the main process; in the others every method does nothing.

    Args:
        folder: of the run.
        first_step: steps done before; what TensorBoard has of later ones belongs to a run that was cut off.
        total_steps: steps until the end.
        enabled: whether this is the main process.
    """

    def __init__(self, folder: Path, first_step: int, total_steps: int, enabled: bool):
        self.folder, self.enabled = folder, enabled
        self._bar = tqdm(
            total=total_steps, initial=first_step, unit="step", disable=None if enabled else True, dynamic_ncols=True
        )
        self._writer = _writer(folder / "tensorboard", first_step + 1) if enabled else None

    def advance(self) -> None:
        """One step more on the bar."""
        self._bar.update()

    def steps(self, first: int, losses: list[float], learning_rate: float, postfix: dict[str, str]) -> None:
        """Losses of the steps from number `first` on (the first of all is 1), and what the bar shows beside them."""
        if not self.enabled:
            return
        with hold_signals():  # else the writer's queue could be left locked, and closing it would never end
            for step, loss in enumerate(losses, first):
                self._writer.add_scalar("train/loss", loss, step)
                self._writer.add_scalar("train/learning_rate", learning_rate, step)
        self._bar.set_postfix(postfix, refresh=False)

    def epoch(self, row: dict[str, float]) -> None:
        """The scalars of an epoch, and everything before, on the disk."""
        if not self.enabled:
            return
        for name in COLUMNS[3:]:
            tag = name.replace("train_", "epoch/train_").replace("validation_", "epoch/validation_")
            with hold_signals():
                self._writer.add_scalar(tag if "/" in tag else f"epoch/{name}", row[name], row["steps"])
        self.flush()

    def flush(self) -> None:
        """TensorBoard's events so far on the disk."""
        if self.enabled:
            with hold_signals():
                self._writer.flush()

    def table(self, rows: list[dict[str, float]]) -> None:
        """metrics.csv."""
        if self.enabled:
            text = io.StringIO()
            writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            replace_file(self.folder / "metrics.csv", text.getvalue())

    def say(self, line: str) -> None:
        """A line on standard output, above the bar where there is one."""
        if self.enabled:
            tqdm.write(line)

    def close(self) -> None:
        self._bar.close()
        if self.enabled:
            with hold_signals():
                self._writer.close()


def epoch_line(row: dict[str, float], epochs: int) -> str:
    return (
        f"epoch {row['epoch']}/{epochs}: train loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.2f} %; "
        f"validation loss {row['validation_loss']:.4f}, accuracy {row['validation_accuracy']:.2f} %; "
        f"{row['images_per_second']:.0f} images/s, peak {row['peak_memory_mb']:.0f} MB"
    )


def _writer(folder: Path, purge_step: int):
    return library("torch.utils.tensorboard").SummaryWriter(str(folder), purge_step=purge_step)
