"""The training loop: steps, epochs, validation, checkpoints."""

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from training import checkpoint, run_folder
from training.data.loader import Loader
from training.data.sets import DataSet
from training.errors import UserError
from training.memory import PeakMemory
from training.model import build, distribute, prepare
from training.processes import Processes
from training.records import Records, write_table
from training.step import Gradients, GraphedGradients, evaluate, learning_rate, make_optimizer


@dataclass
class State:
    """The state of a run, but for weights and optimizer, as a checkpoint holds it.

    It is equal in all processes, but for times and memory, of which those of the main process count.
    """

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


class Trainer:
    """Train the network of `options` on a data set, and fill the run's folder.

    Args:
        options: see options.parse.
        processes: of the run; every one has a trainer.
        dataset: images and labels.
        data: their mean and deviation.
    """

    def __init__(
        self, options: argparse.Namespace, processes: Processes, dataset: DataSet, data: run_folder.DataDescription
    ):
        self.options, self.processes, self.dataset, self.data = options, processes, dataset, data
        self.device = processes.device
        torch.manual_seed(options.seed)
        self.model = prepare(build(options, len(data.classes), data.channels), options, processes)
        self.network = distribute(self.model, options, processes)
        self.optimizer = make_optimizer(self.model.parameters(), options)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "fp16")
        torch.manual_seed(options.seed + 1_000_003 * processes.rank)  # masks differ between the processes
        self.loader, self.validation = self._make_loader("train"), self._make_loader("validation")
        self.steps = self.loader.steps // options.accumulate  # an epoch
        if self.steps == 0:
            raise UserError(f"--accumulate is {options.accumulate}; it may be at most {self.loader.steps}, all batches")
        self.last_step = min(self.steps * options.epochs, options.limit_steps or math.inf)
        self.unread: list[Tensor] = []  # float64 [2] on the device: sums of loss and hits of each of the last steps
        self.state = State()

    def _make_loader(self, split: str) -> Loader:
        return Loader(self.dataset, split, self.options, self.processes, self.data.mean, self.data.std)

    def count_images(self, steps: int) -> int:
        """Return the images of so many steps, in all processes."""
        return steps * self.options.accumulate * self.options.batch_size * self.processes.world_size

    def restore(self, found: dict) -> None:
        """Go on from a checkpoint: the rest of the run is equal to an uninterrupted one, bit by bit on one machine."""
        self.model.load_state_dict(found["weights"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.scaler.load_state_dict(found["scaler"])
        self.state = State(**found["state"])
        generators = found["generators"][self.processes.rank]
        torch.set_rng_state(generators["cpu"])
        if self.device.type == "cuda" and "cuda" in generators:
            torch.cuda.set_rng_state(generators["cuda"], self.device)

    def train(self) -> None:
        """Train all epochs that remain, or fewer with --limit-steps.

        Raises:
            UserError: the loss is no number any more, or a file cannot be written.
        """
        state = self.state
        self.records = Records(self.options.output, state.step, self.last_step, self.processes.main)
        with closing(self.records), closing(self.loader), closing(self.validation):
            self._write_results()
            self.gradients, self.memory = self._make_gradients(), PeakMemory(self.device)
            while state.epoch < self.options.epochs:
                self._train_epoch()
                complete = state.epoch_step == self.steps
                if state.epoch_step > 0:  # else the limit of steps is the end of the last epoch
                    self._end_epoch(complete)
                if not complete:
                    break

    def test(self) -> dict[str, float]:
        """Load the best weights into the model, and return their loss and accuracy on the test split."""
        self.model.load_state_dict(self.state.best["weights"])
        with closing(self._make_loader("test")) as loader:
            return evaluate(self.model, loader, self.processes, self.options.amp)

    def _make_gradients(self) -> Gradients | GraphedGradients:
        options = self.options
        network = torch.compile(self.network) if options.compile else self.network
        gradients = Gradients(network, self.scaler, options.amp, options.accumulate)
        if not options.cuda_graph:
            return gradients
        self.model.train()
        return GraphedGradients(gradients, *next(self.loader.epoch(0)))

    def _train_epoch(self) -> None:
        """Take the steps from state.epoch_step to the end of the epoch, or to the last one of the run."""
        options, state = self.options, self.state
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(options, state.epoch)
        self.model.train()
        self.memory.reset()
        batches = self.loader.epoch(state.epoch, state.epoch_step * options.accumulate)
        self.clock = time.perf_counter()
        while state.epoch_step < self.steps and state.step < self.last_step:
            self._step(batches)
            state.step, state.epoch_step = state.step + 1, state.epoch_step + 1
            self.records.advance()
            if state.step % options.log_steps == 0:
                self._read_losses()
            due = options.checkpoint_steps is not None and state.step % options.checkpoint_steps == 0
            if due and state.epoch_step < self.steps:
                self._stop_clock()
                self._save()
                self.clock = time.perf_counter()
        self._stop_clock()

    def _step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Take a step of the optimizer. On a GPU nothing here waits for it, unless --amp fp16 has to look for overflows."""
        options = self.options
        self.gradients.clear()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for part in range(options.accumulate):
            start = time.perf_counter()
            images, labels = next(batches)
            self.state.waited += time.perf_counter() - start
            last = part == options.accumulate - 1
            with nullcontext() if last or self.processes.world_size == 1 else self.network.no_sync():
                sums += self.gradients(images, labels)
        self.unread.append(sums)
        if options.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _read_losses(self) -> None:
        """Read losses and hits of the last steps: only here the host waits for the device.

        They are added one by one, so that sums do not depend on when they are read.
        """
        state = self.state
        if not self.unread:
            return
        sums = self.processes.reduce_sum(torch.stack(self.unread)).tolist()
        self.unread.clear()
        batches = self.processes.world_size * self.options.accumulate
        first = state.step - len(sums) + 1
        losses = [loss / batches for loss, _ in sums]
        for step, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                raise self._diverged(f"the loss of step {step} is {loss}")
        for loss, (_, hits) in zip(losses, sums, strict=True):
            state.loss += loss
            state.hits += hits
        images = self.count_images(state.epoch_step)
        shown = {
            "loss": f"{state.loss / state.epoch_step:.4f}",
            "accuracy": f"{100 * state.hits / images:.2f} %",
            "images/s": f"{images / (state.seconds + time.perf_counter() - self.clock):.0f}",
            "peak": f"{max(state.peak_memory, self.memory.read()):.0f} MB",
        }
        self.records.steps(first, losses, learning_rate(self.options, state.epoch), shown)

    def _stop_clock(self) -> None:
        state = self.state
        self._read_losses()
        state.seconds += time.perf_counter() - self.clock
        state.peak_memory = max(state.peak_memory, self.memory.read())

    def _end_epoch(self, complete: bool) -> None:
        """Validate, write a checkpoint, and record the epoch."""
        state = self.state
        if not complete:
            self._save()  # before the row, which belongs to this end and not to what follows with a higher limit
        row = self._validate()
        self.records.epoch(row, self.options.epochs)
        if complete:
            state.next_epoch()
            self._save()
        self._write_results()

    def _validate(self) -> dict[str, float]:
        """Return the row of the epoch, which is put into the state with the weights, if they are the best."""
        state, options = self.state, self.options
        # Running statistics belong to each process alone until here.
        self.processes.broadcast(list(self.model.buffers()))
        result = evaluate(self.model, self.validation, self.processes, options.amp)
        if not math.isfinite(result["loss"]):
            raise self._diverged(f"the validation loss after step {state.step} is {result['loss']}")
        state.train_seconds += state.seconds
        images = self.count_images(state.epoch_step)
        row = {
            "epoch": state.epoch + 1,
            "steps": state.step,
            "learning_rate": learning_rate(options, state.epoch),
            "train_loss": state.loss / state.epoch_step,
            "train_accuracy": 100 * state.hits / images,
            "validation_loss": result["loss"],
            "validation_accuracy": result["accuracy"],
            "images_per_second": images / state.seconds,
            "data_wait_percent": 100 * state.waited / state.seconds,
            "peak_memory_mb": state.peak_memory,
            "train_seconds": state.train_seconds,
        }
        state.rows.append(row)
        if state.best is None or result["loss"] < state.best["validation_loss"]:
            weights = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
            best = {name: row[name] for name in ("epoch", "validation_loss", "validation_accuracy")}
            state.best = {**best, "weights": weights}
        return row

    def _save(self) -> None:
        """Write a checkpoint, unless a weight is no number any more."""
        self.records.flush()
        tensors = [tensor for tensor in self.model.state_dict().values() if tensor.is_floating_point()]
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            raise self._diverged(f"a weight is infinite or not a number after step {self.state.step}")
        generators = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        generators = self.processes.gather(generators)
        if self.processes.main:
            state = {
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "state": vars(self.state),
                "generators": generators,
                "options": run_folder.fixed_options(self.options, self.processes),
            }
            folder = self.options.output / run_folder.CHECKPOINTS
            checkpoint.save(folder, self.state.step, self.model.state_dict(), state)

    def _write_results(self) -> None:
        """Write metrics.csv and the best weights, from the state: after a resumption they are those of the checkpoint."""
        if not self.processes.main:
            return
        folder, best = self.options.output, self.state.best
        write_table(folder / run_folder.METRICS, self.state.rows)
        if best is not None:
            content = checkpoint.format_weights(best["weights"], {"epoch": str(best["epoch"])})
            checkpoint.replace_file(folder / run_folder.BEST, content)

    def _diverged(self, what: str) -> UserError:
        good = checkpoint.paths(self.options.output / run_folder.CHECKPOINTS)
        last = f"the last good state is kept in {good[-1]}" if good else "there is no checkpoint yet"
        return UserError(
            f"{what}, in epoch {self.state.epoch + 1}: the training has diverged; {last}. A smaller --lr (now "
            f"{self.options.lr}) or --clip-norm 1 helps, in a run with another --output"
        )
