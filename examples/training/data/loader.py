"""Batches on the device: equal whether they come from memory or through worker processes."""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from training.data.augment import Normalize, draw_plan, shift_and_flip
from training.data.images import Images, Reader, read_all
from training.data.sets import DataSet
from training.errors import UserError, explain
from training.processes import Processes


def statistics(dataset: DataSet, data_in: str = "auto", workers: int = 4) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of each channel, float64 [C], over the pixels of the training images scaled to 0..1.

    Images in files that will fit into memory, as `Loader` judges it, are decoded for the loader, too; else they pass
    through. The sums are whole numbers below 2^53: exact, and equal in any order.
    """
    train, images = dataset.splits["train"], dataset.images
    if fits(images, torch.device("cpu"), data_in):
        pixels = images.decode(train, workers)
        batches = (pixels[chunk] for chunk in train.split(1000))
    else:
        batches = (batch for _, batch in read_all(images, train, workers))
    total = squares = torch.zeros(images.channels, dtype=torch.float64)
    for batch in batches:
        values = batch.transpose(0, 1).flatten(1).double()
        total = total + values.sum(1)
        squares = squares + values.square().sum(1)
    count = len(train) * images.size**2
    mean = total / count
    variance = squares / count - mean.square()
    if (variance <= 1e-6).any():  # less than one pixel in a million off by one
        raise UserError(
            f"all training images of '{dataset.name}' are of one color in a channel: there is nothing to learn"
        )
    return mean / 255, variance.sqrt() / 255


def fits(images: Images, device: torch.device, data_in: str = "auto", world_size: int = 1) -> bool:
    """Return True if images are to be held in memory: by `data_in` ('memory' or 'workers'), or ('auto') if they take less
    than a quarter of what is free on the device and, while they still have to be decoded, of the machine's memory."""
    if data_in != "auto":
        return data_in == "memory"
    if images.pixels is None and 4 * images.nbytes * world_size >= _free_host_memory():
        return False
    return device.type != "cuda" or 4 * images.nbytes < torch.cuda.mem_get_info(device)[0]


def _free_host_memory() -> int:
    """Return the bytes that processes can have: free ones and those of the caches of files."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Loader:
    """Batches of one split of a data set for one of several processes.

    Split 'train': a global batch is world_size * batch_size images of a random order, of which process `rank` takes its
    slice; the last, incomplete one is dropped. Order, shifts and flips depend on the seed and the epoch alone, so the
    processes together see what one process with their whole batch would see. Other splits, and training images with
    `augment` off: every world_size-th image of the split in its order; the last batch may be smaller.

    In memory, the images are uint8 on the device; otherwise processes decode each of them anew, see `fits`.

    Args:
        options: batch_size, seed, pad, flip, data_in, workers, channels_last of train.py.
        mean, std: [C], of pixels scaled to 0..1.

    Raises:
        UserError: the split has too few images for one step, or does not fit on the device.
    """

    def __init__(
        self,
        dataset: DataSet,
        split: str,
        options: argparse.Namespace,
        processes: Processes,
        mean: Sequence[float],
        std: Sequence[float],
        augment: bool = True,
    ):
        self.device, self.rank, self.world_size = processes.device, processes.rank, processes.world_size
        self.batch_size, self.seed, self.train = options.batch_size, options.seed, augment and split == "train"
        flip = dataset.flip if options.flip is None else options.flip
        self.pad, self.flip = (options.pad, flip) if self.train else (0, False)
        self.memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        self.normalize = Normalize(mean, std, self.device)
        self.split = dataset.splits[split]
        self.steps = self._count_steps(split)
        self.labels = dataset.labels[self.split].to(self.device)
        self.in_memory = fits(dataset.images, self.device, options.data_in, self.world_size)
        self._reader = None
        if self.in_memory:
            self._hold(dataset.images, options.workers)
        else:
            self._reader = Reader(dataset.images, options.workers, pin_memory=self.device.type == "cuda")

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

    def _hold(self, images: Images, workers: int) -> None:
        """Hold the images of the split in memory: on the CPU all images of the data set, without a copy."""
        megabytes = len(self.split) * images.nbytes / len(images) / 1e6
        what = f"{megabytes:.0f} MB of images do not fit into memory"
        with explain(RuntimeError, what=what, remedy="--data-in workers reads them batch by batch"):  # of the allocator
            self._pixels, self._rows = images.decode(self.split, workers), self.split
            if self.device.type != "cpu":
                self._pixels = self._pixels[self.split].to(self.device)
                self._rows = torch.arange(len(self.split), device=self.device)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images [B, C, S, S], normalized, and labels int64 [B], both on the device, from batch number `start` on.

        A later start gives the very batches that a whole epoch gives from there.
        """
        steps = torch.arange(start, self.steps)
        if self.train:
            plan = draw_plan(len(self.split), self.seed, epoch, self.pad, self.flip)
            firsts = (steps * self.world_size + self.rank) * self.batch_size
        else:
            plan = torch.arange(self.rank, len(self.split), self.world_size)[:, None]
            firsts = steps * self.batch_size
        slices = [slice(first, first + self.batch_size) for first in firsts.tolist()]
        for images, part in self._read(plan, slices):
            if self.pad or self.flip:
                images = shift_and_flip(images, part, self.pad, self.normalize)
            else:
                images = self.normalize(images)
            yield images.contiguous(memory_format=self.memory_format), self.labels[part[:, 0]]

    def _read(self, plan: Tensor, slices: list[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images uint8 [B, C, S, S] on the device with their part of the plan. No batch waits for the device."""
        on_device = plan.to(self.device)
        if self.in_memory:
            for samples in slices:
                part = on_device[samples]
                yield self._pixels.index_select(0, self._rows[part[:, 0]]), part
            return
        wanted = [self.split[plan[samples, 0]] for samples in slices]
        for samples, images in zip(slices, self._reader.batches(wanted), strict=True):
            yield images.to(self.device, non_blocking=True), on_device[samples]

    def close(self) -> None:
        """End the worker processes."""
        if self._reader is not None:
            self._reader.close()
