"""CIFAR-10 and CIFAR-100, read and fetched by torchvision."""

from pathlib import Path

import torch
from torch import Tensor

from training.download import fetching, import_torchvision
from training.errors import UserError


def read_cifar(name: str, folder: Path, download: bool):
    """((images uint8 [N, 3, 32, 32], labels int64 [N]) of the training files, the same of the test file, class names)."""
    datasets = import_torchvision(f"--dataset {name}").datasets
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    if folder.name == kind.base_folder:
        folder = folder.parent
    if download:
        with fetching(kind.url, folder):
            kind(folder, download=True)
    _check_files(kind, folder / kind.base_folder)
    try:
        train, test = kind(folder, train=True), kind(folder, train=False)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{folder / kind.base_folder} cannot be read: {error}") from error
    return _tensors(train), _tensors(test), list(train.classes)


def _check_files(kind, folder: Path) -> None:
    """Raises UserError naming the first file that is missing or has not the MD5 sum that torchvision lists."""
    from torchvision.datasets.utils import check_integrity

    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: --download fetches it, --data names the folder that holds it")
    for file, md5 in [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]:
        if not (folder / file).is_file():
            raise UserError(f"{folder / file} is missing: --download fetches it")
        if not check_integrity(folder / file, md5):
            raise UserError(
                f"{folder / file} is damaged or incomplete (its MD5 sum is not {md5}): --download replaces it"
            )


def _tensors(data) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(data.targets, dtype=torch.int64)
