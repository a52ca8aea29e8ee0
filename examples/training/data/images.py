"""Square images of uint8, in memory or in files that worker processes decode."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert
from tqdm import tqdm

from training.errors import UserError, explain, library

CHUNK = 64  # images that pass at once through the worker processes when a whole set is read


def read_image(path: Path | str, size: int, channels: int = 3) -> Tensor:
    """Read a file as uint8 [channels, size, size]: RGB (or grey, if `channels` is 1), the largest centered square of it,
    resized bilinearly with antialiasing.

    Raises:
        UserError: the file is missing, truncated or no image; the message names it.
    """
    pil, ops = (library(module, f"reading {path}") for module in ("PIL.Image", "PIL.ImageOps"))
    # Pillow raises OSError, SyntaxError, ValueError, EOFError, struct.error, ...
    with explain(Exception, what=f"{path} cannot be read as an image", remedy="replace the file or remove it"):
        with pil.open(path) as image:
            image = image.convert("RGB" if channels == 3 else "L")
    pixels = torch.from_numpy(numpy.array(ops.fit(image, (size, size), pil.Resampling.BILINEAR)))
    return pixels.view(size, size, channels).permute(2, 0, 1).contiguous()


class Images(Dataset):
    """Images uint8 [channels, size, size] in memory.

    Args:
        pixels: uint8 [N, channels, size, size].
    """

    def __init__(self, pixels: Tensor):
        self.pixels: Tensor | None = pixels
        self.channels, self.size = pixels.shape[1:3]

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def nbytes(self) -> int:
        """Size of all images, decoded."""
        return len(self) * self.channels * self.size**2

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels[index]

    def __getitems__(self, indices: list[int]) -> Tensor | UserError:
        """Return a batch. A UserError is returned, too: the DataLoader would wrap one that is raised into a traceback."""
        try:
            return torch.stack([self[index] for index in indices])
        except UserError as error:
            return error

    def decode(self, indices: Tensor, workers: int = 0) -> Tensor:
        """Return all images, of which those at `indices` are valid: [N, channels, size, size]."""
        return self.pixels


class ImageFiles(Images):
    """Images in files, which are read as RGB unless `channels` is 1. `pixels` is None until `decode` is called."""

    def __init__(self, files: Sequence[Path | str], size: int, channels: int = 3):
        self.files = [os.fspath(file) for file in files]
        self.channels, self.size = channels, size
        self.pixels = None
        self._decoded = torch.zeros(len(self.files), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return read_image(self.files[index], self.size, self.channels)

    def decode(self, indices: Tensor, workers: int = 0) -> Tensor:
        """Decode each of the images at `indices` (int64 [n]) once, and return `pixels`, which is valid there.

        Pages of `pixels` that no image was written to take no memory.
        """
        if self.pixels is None:
            self.pixels = torch.empty(len(self), self.channels, self.size, self.size, dtype=torch.uint8)
        missing = indices[~self._decoded[indices]]
        for chunk, images in read_all(self, missing, workers):
            self.pixels[chunk] = images
            self._decoded[chunk] = True
        return self.pixels

    def __getstate__(self) -> dict:
        """Leave out `pixels`: worker processes read files."""
        return {**self.__dict__, "pixels": None, "_decoded": torch.zeros_like(self._decoded)}


class Reader:
    """Worker processes that read batches of images; with `workers` 0 this process does it.

    They only decode: what leaves them is uint8, a quarter of the bytes of a normalized image.
    """

    def __init__(self, images: Images, workers: int = 0, pin_memory: bool = False):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(workers, cores)
        self._batches: list[list[int]] = []
        self._loader = DataLoader(
            images,
            batch_sampler=self._batches,
            num_workers=workers,
            collate_fn=default_convert,  # leaves tensors and errors as they are
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
            generator=torch.Generator(),  # or it would draw from the global one, which makes the masks of Drop-Channel
        )

    def batches(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield images uint8 [B, C, S, S] for each tensor of indices [B]. It ends an earlier iterator of this reader."""
        self._batches[:] = [indices.tolist() for indices in batches]
        remedy = "try --workers 0, which reads them in the training process, or --data-in memory"
        what = "a worker process that reads images failed"
        with explain(RuntimeError, what=what, remedy=remedy):  # it was killed, or there is no memory
            for images in self._loader:
                if isinstance(images, UserError):
                    raise images
                yield images

    def close(self) -> None:
        """End the worker processes."""
        self._loader = None


def read_all(images: Images, indices: Tensor, workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield chunks of `indices` [n] with their images uint8 [n, C, S, S], in order, and show a progress bar."""
    if len(indices) == 0:
        return
    reader = Reader(images, workers if len(indices) > CHUNK else 0)
    chunks = indices.split(CHUNK)
    try:
        with tqdm(total=len(indices), desc="reading images", unit="image", leave=False, disable=None) as progress:
            for chunk, pixels in zip(chunks, reader.batches(chunks), strict=True):
                yield chunk, pixels
                progress.update(len(chunk))
    finally:
        reader.close()
