"""Batches on the device, from memory or through worker processes, the same whichever way."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from training.augment import Normalise, Plan, shift_and_flip
from training.datasets import DataSet
from training.errors import UserError
from training.reader import Reader, read_all
from training.sources import Source


def statistics(dataset: DataSet, data_in: str = "auto", workers: int = 4) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, float64 [C], over the pixels of the training images scaled to 0..1.

    Images in files that will fit into memory, as `Loader` judges it, are kept for the loader; else they pass through.
    The sums are whole numbers below 2^53: exact, and the same in any order.
    """
    train, pool = dataset.splits["train"], dataset.pool
    if fits(pool, torch.device("cpu"), data_in):
        images = pool.keep(train, workers)
        batches = (images[chunk] for chunk in train.split(1000))
    else:
        batches = (images for _, images in read_all(pool, train, workers))
    total = squares = torch.zeros(dataset.channels, dtype=torch.float64)
    for batch in batches:
        values = batch.transpose(0, 1).flatten(1).double()
        total = total + values.sum(1)
        squares = squares + values.square().sum(1)
    count = len(train) * dataset.image_size**2
    mean = total / count
    variance = squares / count - mean.square()
    if (variance <= 1e-6).any():  # less than one pixel in a million off by one
        raise UserError(
            f"all training images of '{dataset.name}' are of one colour in a channel: there is nothing to learn"
        )
    return mean / 255, variance.sqrt() / 255


def fits(pool: Source, device: torch.device, data_in: str = "auto", world_size: int = 1) -> bool:
    """Whether images are held in memory: by `data_in` ('memory' or 'workers'), or ('auto') where they take less than a
    quarter of what is free on the device and, if they still have to be decoded, of the machine's memory."""
    if data_in != "auto":
        return data_in == "memory"
    if pool.images is None and 4 * pool.nbytes * world_size >= _free_host_memory():
        return False
    return device.type != "cuda" or 4 * pool.nbytes < torch.cuda.mem_get_info(device)[0]


def _free_host_memory() -> int:
    """Bytes that processes can have: what is free and what caches of files hold."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Loader:
    """Batches of one split of a data set for one of `world_size` processes.

    Training (`train`): a global batch is world_size * batch_size images of a random order, of which process `rank` takes
    its slice; the last, incomplete one is dropped. Order, shifts and flips depend on the seed and the epoch alone, so the
    processes together see what one process with their whole batch would see. Otherwise: every world_size-th image of the
    split in its order, without augmentation; the last batch may be smaller.

    `mean`, `std`: [C], of pixels scaled to 0..1. `pad`, `flip`: the augmentation, see `shift_and_flip`. `data_in`, see
    `fits`: in memory, the images are uint8 on the device; with 'workers', processes decode each of them anew.

    Raises UserError if the split has too few images for one step, or does not fit on the device.
    """

    def __init__(
        self,
        dataset: DataSet,
        split: str,
        *,
        batch_size: int,
        device: torch.device | str,
        mean: Tensor,
        std: Tensor,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        train: bool,
        pad: int = 4,
        flip: bool = False,
        data_in: str = "auto",
        workers: int = 4,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ):
        self.device = torch.device(device)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed, self.train, self.pad, self.flip = seed, train, pad, flip
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.normalise = Normalise(mean, std, self.device, dtype)
        self.split = dataset.splits[split]
        self.steps = self._count_steps(split)
        self.in_memory = fits(dataset.pool, self.device, data_in, world_size)
        self.device_bytes = 0  # what the images take on a device that is not the CPU
        self.labels = dataset.labels[self.split].to(self.device)
        self._reader = None
        if self.in_memory:
            self._hold(dataset.pool, workers)
        else:
            self._reader = Reader(dataset.pool, workers, pin_memory=self.device.type == "cuda")
        self.reset()

    def _count_steps(self, split: str) -> int:
        count, together = len(self.split), self.batch_size * self.world_size
        if not self.train:
            return -(-len(range(self.rank, count, self.world_size)) // self.batch_size)
        if count < together:
            raise UserError(
                f"the {count} images of the split '{split}' are fewer than the {together} of one step "
                f"(--batch-size {self.batch_size}, {self.world_size} processes): make --batch-size smaller"
            )
        return count // together

    def _hold(self, pool: Source, workers: int) -> None:
        """Images in memory, and the row of each image of the split there: on the CPU those of the pool, without a copy."""
        try:
            images = pool.keep(self.split, workers)
            if self.device.type == "cpu":
                self._images, self._rows = images, self.split
                return
            self._images = images[self.split].to(self.device)
        except RuntimeError as error:  # of the allocator
            raise UserError(
                f"{len(self.split) * pool.nbytes / len(pool) / 1e6:.0f} MB of images do not fit into memory ({error}): "
                "--data-in workers reads them batch by batch"
            ) from error
        self._rows = torch.arange(len(self.split), device=self.device)
        self.device_bytes = self._images.nbytes

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images [B, C, S, S], normalised, and labels int64 [B], both on the device, from batch number `start` on.

        Starting later gives the very batches that a whole epoch gives from there.
        """
        batches = self._training(epoch, start) if self.train else self._evaluation(start)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def _training(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        plan = Plan.draw(len(self.split), self.seed, epoch, self.pad, self.flip)
        firsts = [(step * self.world_size + self.rank) * self.batch_size for step in range(start, self.steps)]
        slices = [slice(first, first + self.batch_size) for first in firsts]
        for images, part in self._read(plan, slices):
            if self.pad or self.flip:
                images = shift_and_flip(images, part, self.pad, self.normalise)
            else:
                images = self.normalise(images)
            yield images.contiguous(memory_format=self.memory_format), self.labels[part.order]

    def _evaluation(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        mine = torch.arange(self.rank, len(self.split), self.world_size)
        plan = Plan(mine, torch.zeros(len(mine), 2, dtype=torch.int64), torch.zeros(len(mine), dtype=torch.bool))
        slices = [slice(step * self.batch_size, (step + 1) * self.batch_size) for step in range(start, self.steps)]
        for images, part in self._read(plan, slices):
            images = self.normalise(images).contiguous(memory_format=self.memory_format)
            yield images, self.labels[part.order]

    def _read(self, plan: Plan, slices: list[slice]) -> Iterator[tuple[Tensor, Plan]]:
        """Images uint8 [B, C, S, S] on the device with their part of the plan. No batch waits for the device."""
        there = plan.to(self.device)
        if self.in_memory:
            for samples in slices:
                part = there[samples]
                yield self._images.index_select(0, self._rows[part.order]), part
            return
        wanted = [self.split[plan.order[samples]] for samples in slices]
        for samples, images in zip(slices, self._reader.batches(wanted), strict=True):
            yield images.to(self.device, non_blocking=True), there[samples]

    def reset(self) -> None:
        """Starts `waited` anew: seconds that the consumer spent in here."""
        self.waited = 0.0

    def close(self) -> None:
        """Ends the worker processes."""
        if self._reader is not None:
            self._reader.close()
