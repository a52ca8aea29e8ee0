"""The training loop: steps, epochs, validation, checkpoints."""

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from training import checkpoint, run_folder
from training.cuda_graph import GraphedGradients
from training.datasets import DataSet
from training.errors import UserError
from training.evaluation import evaluate
from training.files import replace_file
from training.gradients import Gradients
from training.loader import Loader
from training.losses import Losses
from training.memory import PeakMemory
from training.model import build, distribute, prepare
from training.processes import Processes
from training.recipe import learning_rate, make_optimizer
from training.records import Records, epoch_line
from training.state import State


class Trainer:
    """Trains the network of `options` on a data set, and keeps the run's folder.

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
        self.loader, self.validation = self.make_loader("train"), self.make_loader("validation")
        self.steps = self.loader.steps // options.accumulate  # an epoch
        if self.steps == 0:
            raise UserError(f"--accumulate is {options.accumulate}; it may be at most {self.loader.steps}, all batches")
        self.last_step = min(self.steps * options.epochs, options.limit_steps or math.inf)
        self.losses = Losses(options.log_steps, processes)
        self.state = State()

    def make_loader(self, split: str) -> Loader:
        """Batches of 'train', 'validation' or 'test' for this process."""
        options, processes = self.options, self.processes
        return Loader(
            self.dataset,
            split,
            batch_size=options.batch_size,
            device=self.device,
            mean=self.data.mean,
            std=self.data.std,
            seed=options.seed,
            rank=processes.rank,
            world_size=processes.world_size,
            train=split == "train",
            pad=options.pad,
            flip=self.dataset.flip if options.flip is None else options.flip,
            data_in=options.data_in,
            workers=options.workers,
            channels_last=options.channels_last,
        )

    def restore(self, found: checkpoint.Checkpoint) -> None:
        """Goes on from a checkpoint: what follows is what would have followed there, bit by bit on the same machine."""
        saved = found.state
        self.model.load_state_dict(found.weights)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.state = State(**saved["state"])
        generators = saved["generators"][self.processes.rank]
        torch.set_rng_state(generators["cpu"])
        if self.device.type == "cuda" and "cuda" in generators:
            torch.cuda.set_rng_state(generators["cuda"], self.device)

    def train(self) -> None:
        """All epochs that remain, or fewer with --limit-steps.

        Raises:
            UserError: the loss is no number any more, or a file cannot be written.
        """
        state = self.state
        self.records = Records(self.options.output, state.step, self.last_step, self.processes.main)
        try:
            self._write_results()
            self.gradients, self.memory = self._make_gradients(), PeakMemory(self.device)
            while state.epoch < self.options.epochs:
                self._train_epoch()
                complete = state.epoch_step == self.steps
                if state.epoch_step > 0:  # else the limit of steps is the end of the last epoch
                    self._end_epoch(complete)
                if not complete:
                    break
        finally:
            self.records.close()
            self.loader.close()
            self.validation.close()

    def test(self) -> dict[str, float]:
        """Loss and accuracy of the best weights on the test split. The model has these weights afterwards."""
        self.model.load_state_dict(self.state.best["weights"])
        loader = self.make_loader("test")
        try:
            return evaluate(self.model, loader, self.processes, self.options.amp)
        finally:
            loader.close()

    def _make_gradients(self) -> Gradients | GraphedGradients:
        options = self.options
        network = torch.compile(self.network) if options.compile else self.network
        gradients = Gradients(network, self.scaler, options.amp, options.accumulate)
        if not options.cuda_graph:
            return gradients
        self.model.train()
        size = self.data.image_size
        images = torch.zeros(options.batch_size, self.data.channels, size, size, device=self.device)
        if options.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return GraphedGradients(gradients, images, images.new_zeros(options.batch_size, dtype=torch.int64))

    def _train_epoch(self) -> None:
        """The steps from state.epoch_step to the end of the epoch, or to the last one of the run."""
        options, state = self.options, self.state
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(options, state.epoch)
        self.model.train()
        self.memory.reset()
        batches = self.loader.epoch(state.epoch, state.epoch_step * options.accumulate)
        self._start_clock()
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
                self._start_clock()
        self._stop_clock()

    def _step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One step of the optimizer. On a GPU nothing here waits for it, unless --amp fp16 has to look for overflows."""
        options = self.options
        self.gradients.clear()
        for part in range(options.accumulate):
            images, labels = next(batches)
            last = part == options.accumulate - 1
            with nullcontext() if last or self.processes.world_size == 1 else self.network.no_sync():
                self.losses.add(self.gradients(images, labels))
        self.losses.end_step()
        if options.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _read_losses(self) -> None:
        """Losses and hits of the last steps: the only place where the host waits for the device.

        They are added one by one, so that sums do not depend on when they are read.
        """
        state = self.state
        taken = self.losses.take()
        if not taken:
            return
        batches = self.processes.world_size * self.options.accumulate
        first = state.step - len(taken) + 1
        losses = [loss / batches for loss, _ in taken]
        for step, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                raise self._diverged(f"the loss of step {step} is {loss}")
        for loss, (_, hits) in zip(losses, taken, strict=True):
            state.loss += loss
            state.hits += hits
        shown = {
            "loss": f"{state.loss / state.epoch_step:.4f}",
            "accuracy": f"{100 * state.hits / self._images():.2f} %",
            "images/s": f"{self._images() / (state.seconds + time.perf_counter() - self.clock):.0f}",
            "peak": f"{max(state.peak_memory, self.memory.read()):.0f} MB",
        }
        self.records.steps(first, losses, learning_rate(self.options, state.epoch), shown)

    def _images(self) -> int:
        """Of the running epoch, in all processes."""
        options = self.options
        return self.state.epoch_step * options.accumulate * options.batch_size * self.processes.world_size

    def _start_clock(self) -> None:
        self.loader.reset()
        self.clock = time.perf_counter()

    def _stop_clock(self) -> None:
        state = self.state
        self._read_losses()
        state.seconds += time.perf_counter() - self.clock
        state.waited += self.loader.waited
        state.peak_memory = max(state.peak_memory, self.memory.read())

    def _end_epoch(self, complete: bool) -> None:
        """Validation, checkpoint, and what the run tells of the epoch."""
        state = self.state
        if not complete:
            self._save()  # before the row, which belongs to this end and not to what follows with a higher limit
        row = self._validate()
        self.records.epoch(row)
        if complete:
            state.next_epoch()
            self._save()
        self._write_results()
        self.records.say(epoch_line(row, self.options.epochs))

    def _validate(self) -> dict[str, float]:
        """The row of the epoch, which is put into the state with the weights, if they are the best."""
        state, options = self.state, self.options
        self.processes.broadcast(list(self.model.buffers()))  # running statistics are each process's own until here
        result = evaluate(self.model, self.validation, self.processes, options.amp)
        if not math.isfinite(result["loss"]):
            raise self._diverged(f"the validation loss after step {state.step} is {result['loss']}")
        state.train_seconds += state.seconds
        row = {
            "epoch": state.epoch + 1,
            "steps": state.step,
            "learning_rate": learning_rate(options, state.epoch),
            "train_loss": state.loss / state.epoch_step,
            "train_accuracy": 100 * state.hits / self._images(),
            "validation_loss": result["loss"],
            "validation_accuracy": result["accuracy"],
            "images_per_second": self._images() / state.seconds,
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
        """A checkpoint, unless a weight is no number any more."""
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
        """metrics.csv and the best weights, from the state: after a resumption they are those of the checkpoint."""
        self.records.table(self.state.rows)
        best = self.state.best
        if best is not None and self.processes.main:
            content = checkpoint.format_weights(best["weights"], {"epoch": str(best["epoch"])})
            replace_file(self.options.output / run_folder.BEST, content)

    def _diverged(self, what: str) -> UserError:
        kept = checkpoint.paths(self.options.output / run_folder.CHECKPOINTS)
        last = f"the last good state is kept in {kept[-1]}" if kept else "there is no checkpoint yet"
        return UserError(
            f"{what}, in epoch {self.state.epoch + 1}: the training has diverged; {last}. A smaller --lr (now "
            f"{self.options.lr}) or --clip-norm 1 helps, in a run with another --output"
        )
