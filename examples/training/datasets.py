"""The data sets by name: digits, CIFAR, Tiny ImageNet, a folder of images."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from training.cifar import read_cifar
from training.errors import UserError
from training.image_folder import read_image_folder
from training.sources import FileSource, MemorySource, Source
from training.splits import stratified
from training.tiny_imagenet import read_tiny_imagenet


@dataclass
class DataSet:
    """Images with labels, cut into splits."""

    name: str
    classes: list[str]
    channels: int
    image_size: int  # images are square
    pool: Source  # all images, in one numbering
    labels: Tensor  # int64 [N]
    splits: dict[str, Tensor]  # 'train', 'validation', 'test': int64 indices into the pool
    flip: bool = True  # whether a mirrored image is still of its class

    def __post_init__(self):
        if len(self.labels) != len(self.pool):
            raise UserError(
                f"'{self.name}' has {len(self.pool)} images but {len(self.labels)} labels: get its files anew"
            )
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise UserError(
                f"'{self.name}' has labels {self.labels.min()} to {self.labels.max()} for {len(self.classes)} classes: "
                "get its files anew"
            )


def load(options) -> DataSet:
    """The data set that `options` names: dataset, data, download, image_size, split_seed.

    Raises UserError where its files are missing or damaged or a library that it needs is missing.
    """
    if options.image_size is not None and options.image_size < 1:
        raise UserError(f"--image-size must be at least 1, it was {options.image_size}")
    if options.dataset not in LOADERS:
        raise UserError(f"--dataset must be one of {', '.join(LOADERS)}, it was '{options.dataset}'")
    return LOADERS[options.dataset](options)


def load_digits(options) -> DataSet:
    """The 1797 handwritten digits of scikit-learn, 8x8 pixels, enlarged; a fifth is for the test, a tenth for validation."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise UserError(
            f"--dataset digits needs scikit-learn, which cannot be imported ({error}): pip install scikit-learn"
        ) from error
    digits = datasets.load_digits()
    size = options.image_size or 32
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] * (255 / 16)
    images = F.interpolate(images, size=size, mode="bilinear", align_corners=False).round().to(torch.uint8)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    classes = [str(digit) for digit in range(10)]
    splits = stratified(labels, classes, {"validation": 0.1, "test": 0.2}, options.split_seed)
    return DataSet("digits", classes, 1, size, MemorySource(images), labels, splits, flip=False)


def load_cifar(options) -> DataSet:
    """CIFAR-10 or -100: the training files give training and, a tenth of each class, validation; the test file the test."""
    if options.image_size not in (None, 32):
        raise UserError(f"--image-size is 32 for {options.dataset}, it was {options.image_size}: leave it out")
    train, test, classes = read_cifar(options.dataset, data_folder(options), options.download)
    labels = torch.cat([train[1], test[1]])
    splits = stratified(train[1], classes, {"validation": 0.1}, options.split_seed)
    splits["test"] = torch.arange(len(train[1]), len(labels))
    return DataSet(options.dataset, classes, 3, 32, MemorySource(torch.cat([train[0], test[0]])), labels, splits)


def load_tiny_imagenet(options) -> DataSet:
    """Tiny ImageNet: a tenth of the training images of each class is for the test; validation is the set's own."""
    (files, labels), validation, classes = read_tiny_imagenet(data_folder(options), options.download)
    splits = stratified(torch.tensor(labels), classes, {"test": 0.1}, options.split_seed)
    splits["validation"] = torch.arange(len(files), len(files) + len(validation[0]))
    return _of_files(options, classes, files + validation[0], labels + validation[1], splits)


def load_folder(options) -> DataSet:
    """Images of one's own. What has no folder, validation or test, is cut from the others: a tenth of each class."""
    if options.data is None:
        raise UserError("--dataset folder needs --data, the folder of images")
    parts, classes = read_image_folder(Path(options.data))
    files, labels, splits = [], [], {}
    for part, (own_files, own_labels) in parts.items():
        splits[part] = torch.arange(len(files), len(files) + len(own_files))
        files, labels = files + own_files, labels + own_labels
    cut = splits.pop("all", splits.get("train"))  # comes first, so its positions are those in the pool
    missing = {part: 0.1 for part in ("validation", "test") if part not in splits}
    splits |= stratified(torch.tensor(labels)[cut], classes, missing, options.split_seed)
    return _of_files(options, classes, files, labels, splits)


def _of_files(options, classes: list[str], files: list[str], labels: list[int], splits: dict[str, Tensor]) -> DataSet:
    size = options.image_size or 32
    return DataSet(options.dataset, classes, 3, size, FileSource(files, size), torch.tensor(labels), splits)


def data_folder(options) -> Path:
    return Path("data") if options.data is None else Path(options.data)


LOADERS = {
    "digits": load_digits,
    "cifar10": load_cifar,
    "cifar100": load_cifar,
    "tiny-imagenet": load_tiny_imagenet,
    "folder": load_folder,
}
