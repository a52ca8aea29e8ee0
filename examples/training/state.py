"""Where a run is: all of it, but for weights and optimizer, that a checkpoint holds."""

from dataclasses import dataclass, field


@dataclass
class State:
    """The same in all processes, but for times and memory, of which those of the main process count."""

    epoch: int = 0  # complete ones
    epoch_step: int = 0  # steps of the running epoch, as are the next five sums of it
    loss: float = 0.0
    hits: float = 0.0
    seconds: float = 0.0  # of training
    waited: float = 0.0  # of these, seconds for data
    peak_memory: float = 0.0  # MB
    step: int = 0  # steps in all
    train_seconds: float = 0.0  # of the epochs in rows
    rows: list[dict] = field(default_factory=list)  # of metrics.csv
    best: dict | None = None  # epoch, validation_loss, validation_accuracy, weights: those of the least validation loss

    def next_epoch(self) -> None:
        self.epoch += 1
        self.epoch_step = 0
        self.loss = self.hits = self.seconds = self.waited = self.peak_memory = 0.0
