"""Worker processes that decode images.

A source is anything with `read(index) -> uint8 [C, S, S]` that can be pickled.
"""

import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from training.errors import UserError

CHUNK = 64  # images that pass at once through the worker processes when a whole set is read


class Reader:
    """Worker processes that read batches of images from a source; with `workers` 0 this process does it.

    They only decode: what leaves them is uint8, a quarter of the bytes of a normalised image.
    """

    def __init__(self, source, workers: int = 0, pin_memory: bool = False):
        workers = min(workers, usable_cores())
        self._batches: Sequence[Tensor] = []
        self._loader = DataLoader(
            _Images(source),
            batch_sampler=_Batches(self),
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
            generator=torch.Generator(),  # or it would draw from the global one, which makes the masks of Drop-Channel
        )

    def batches(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Images uint8 [B, C, S, S] of each tensor of indices [B]. An earlier iterator of this reader ends with it."""
        self._batches = batches
        try:
            for images in self._loader:
                if isinstance(images, UserError):
                    raise images
                yield images
        except RuntimeError as error:  # the DataLoader's, where a process was killed or had no shared memory
            raise UserError(
                f"a worker process that reads images failed ({error}): try --workers 0, which reads them in the training "
                "process, or --data-in memory"
            ) from error

    def close(self) -> None:
        """Ends the worker processes."""
        self._loader = None


class _Images(torch.utils.data.Dataset):
    """A source as the DataLoader wants it: a batch a call. A UserError is handed over, since the DataLoader would wrap a
    raised one into the traceback of the worker."""

    def __init__(self, source):
        self.source = source

    def __getitems__(self, indices: list[int]) -> Tensor | UserError:
        try:
            return torch.stack([self.source.read(index) for index in indices])
        except UserError as error:
            return error


class _Batches:
    """The batch sampler: what `Reader.batches` was called with last."""

    def __init__(self, reader: Reader):
        self.reader = reader

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self.reader._batches)


def read_all(source, indices: Tensor, workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of `indices` [n] with their images uint8 [n, C, S, S], in order, with a progress bar."""
    if len(indices) == 0:
        return
    reader = Reader(source, workers if len(indices) > CHUNK else 0)
    chunks = indices.split(CHUNK)
    try:
        with tqdm(total=len(indices), desc="reading images", unit="image", leave=False, disable=None) as progress:
            for chunk, images in zip(chunks, reader.batches(chunks), strict=True):
                yield chunk, images
                progress.update(len(chunk))
    finally:
        reader.close()


def _as_it_is(batch):
    return batch


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
