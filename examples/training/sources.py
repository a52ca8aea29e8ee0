"""Where the images of a data set come from: memory, or files that are decoded one by one."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from training.errors import UserError
from training.reader import read_all


def read_image(path: Path | str, size: int, channels: int = 3) -> Tensor:
    """The image in a file as uint8 [channels, size, size]: RGB (or grey, if `channels` is 1), the largest centred square
    of it, resized bilinearly with antialiasing.

    Raises UserError, which names the file, where it is missing, truncated or no image.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UserError(
            f"reading {path} needs Pillow, which cannot be imported ({error}): pip install pillow"
        ) from error
    import numpy

    try:
        with Image.open(path) as image:
            image = image.convert("RGB" if channels == 3 else "L")
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, EOFError, struct.error, ...
        raise UserError(f"{path} cannot be read as an image ({error}): replace the file or remove it") from error
    image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(numpy.array(image))
    return pixels.view(size, size, channels).permute(2, 0, 1).contiguous()


class MemorySource:
    """Images [N, C, S, S] of uint8 that are in memory."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    @property
    def nbytes(self) -> int:
        return self.images.nbytes

    def read(self, index: int) -> Tensor:
        return self.images[index]

    def keep(self, indices: Tensor, workers: int = 0) -> Tensor:
        """All images; those at `indices` are valid."""
        return self.images


class FileSource:
    """Images that are decoded from `files`, each as uint8 [channels, size, size]."""

    def __init__(self, files: Sequence[Path | str], size: int, channels: int = 3):
        self.files = [os.fspath(file) for file in files]
        self.size, self.channels = size, channels
        self.images: Tensor | None = None  # what `keep` decoded
        self._kept = torch.zeros(len(self.files), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def nbytes(self) -> int:
        """Size of all images, decoded."""
        return len(self.files) * self.channels * self.size**2

    def read(self, index: int) -> Tensor:
        return read_image(self.files[index], self.size, self.channels)

    def keep(self, indices: Tensor, workers: int = 0) -> Tensor:
        """Decodes the images at `indices` (int64 [n]) that it has not yet, and keeps them: [N, C, S, S], valid there.

        Pages of the result that no image was written to take no memory.
        """
        if self.images is None:
            self.images = torch.empty(len(self), self.channels, self.size, self.size, dtype=torch.uint8)
        missing = indices[~self._kept[indices]]
        for chunk, images in read_all(self, missing, workers):
            self.images[chunk] = images
            self._kept[chunk] = True
        return self.images

    def __getstate__(self) -> dict:
        """Worker processes read files: what is decoded stays here."""
        return {**self.__dict__, "images": None, "_kept": torch.zeros_like(self._kept)}


Source = MemorySource | FileSource
