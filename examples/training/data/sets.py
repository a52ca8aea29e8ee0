"""The data sets by name: digits, CIFAR, Tiny ImageNet, a folder of images. Splits are fixed by a seed."""

import argparse
import os
import shutil
import tarfile
import zipfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from training.data.images import ImageFiles, Images
from training.errors import UserError, explain, library

TINY = "tiny-imagenet-200"
TINY_URL = f"http://cs231n.stanford.edu/{TINY}.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
ANEW = f"fetch the archive anew: delete {TINY} and use --download"
FOLDERS = {"validation": ("val", "validation", "valid"), "test": ("test",)}

Labelled = tuple[list[str], list[int]]  # files and their labels


@dataclass
class DataSet:
    """Images with labels, cut into splits."""

    name: str
    classes: list[str]
    images: Images  # of all splits, in one numbering
    labels: Tensor  # int64 [N]
    splits: dict[str, Tensor]  # 'train', 'validation', 'test': int64 indices into images and labels
    flip: bool = True  # a mirrored image is still of its class


def stratified(labels: Tensor, classes: list[str], fractions: dict[str, float], seed: int) -> dict[str, Tensor]:
    """Cut parts out of each class at random.

    Args:
        labels: int64 [N].
        fractions: of the images of each class by name of the part: rounded, and at least one image.

    Returns ascending int64 indices into `labels` for each part, and for 'train', which is what remains.

    Raises:
        UserError: a class has too few images to give one to each part.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[Tensor]] = {name: [] for name in ("train", *fractions)}
    for label, name in enumerate(classes):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        counts = [max(1, round(fraction * len(members))) for fraction in fractions.values()]
        remaining = len(members) - sum(counts)
        if remaining < 1:
            raise UserError(
                f"class '{name}' has {len(members)} images, too few for {' and '.join(parts)}, which need one each: "
                "add images of it or remove the class"
            )
        for part, indices in zip(parts, members.split([remaining, *counts]), strict=True):
            parts[part].append(indices)
    return {part: torch.cat(indices).sort().values for part, indices in parts.items()}


def load(options: argparse.Namespace) -> DataSet:
    """Read the data set that `options` names: dataset, data, download, image_size, split_seed.

    Raises:
        UserError: its files are missing or damaged, or a library that it needs is missing.
    """
    return LOADERS[options.dataset](options)


def load_digits(options: argparse.Namespace) -> DataSet:
    """Enlarge scikit-learn's 1797 handwritten digits of 8x8 pixels; hold out a fifth for the test, a tenth for validation."""
    digits = library("sklearn.datasets", "--dataset digits").load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] * (255 / 16)
    pixels = F.interpolate(pixels, size=options.image_size or 32, mode="bilinear", align_corners=False)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    classes = [str(digit) for digit in range(10)]
    splits = stratified(labels, classes, {"validation": 0.1, "test": 0.2}, options.split_seed)
    return DataSet("digits", classes, Images(pixels.round().to(torch.uint8)), labels, splits, flip=False)


def load_cifar(options: argparse.Namespace) -> DataSet:
    """Read CIFAR-10 or -100: a tenth of each class of the training files is for validation, the test file for the test."""
    if options.image_size not in (None, 32):
        raise UserError(f"--image-size is 32 for {options.dataset}, it was {options.image_size}: leave it out")
    datasets = library("torchvision.datasets", f"--dataset {options.dataset}")
    kind = getattr(datasets, options.dataset.upper())
    folder = _data_folder(options, kind.base_folder).parent
    if options.download:
        with explain_fetching(kind.url, folder):
            kind(folder, download=True)
    files = folder / kind.base_folder
    _check_cifar_files(kind, files)
    with explain(RuntimeError, OSError, what=f"{files} cannot be read"):
        train, test = (kind(folder, train=train) for train in (True, False))
    images = torch.cat([torch.from_numpy(data.data).permute(0, 3, 1, 2) for data in (train, test)]).contiguous()
    labels = torch.tensor(train.targets + test.targets, dtype=torch.int64)
    count = len(train.targets)
    splits = stratified(labels[:count], train.classes, {"validation": 0.1}, options.split_seed)
    splits["test"] = torch.arange(count, len(labels))
    return DataSet(options.dataset, list(train.classes), Images(images), labels, splits)


def _check_cifar_files(kind: type, folder: Path) -> None:
    """Raise UserError naming the first file that is missing or has not the MD5 sum that torchvision lists."""
    check_integrity = library("torchvision.datasets.utils").check_integrity
    _check_folder(folder)
    for file, md5 in [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]:
        if not (folder / file).is_file():
            raise UserError(f"{folder / file} is missing: --download fetches it")
        if not check_integrity(folder / file, md5):
            raise UserError(
                f"{folder / file} is damaged or incomplete (its MD5 sum is not {md5}): --download replaces it"
            )


def load_tiny_imagenet(options: argparse.Namespace) -> DataSet:
    """Read Tiny ImageNet: 200 classes with 500 training and 50 validation images of 64x64 each, and test images without labels,
    which are left out: a tenth of the training images of each class is for the test.

    tiny-imagenet-200/wnids.txt                               a class a line
    tiny-imagenet-200/words.txt                               class, tab, its names; may be missing
    tiny-imagenet-200/train/<class>/images/<class>_<n>.JPEG
    tiny-imagenet-200/val/images/val_<n>.JPEG
    tiny-imagenet-200/val/val_annotations.txt                 file, tab, class, tab, the box of the object
    """
    root = _data_folder(options, TINY)
    if options.download and not root.is_dir():
        _fetch_tiny(root)
    _check_folder(root)
    wnids = sorted(_lines(root / "wnids.txt"))  # a label is a position here
    if not wnids:
        raise UserError(f"{root / 'wnids.txt'} names no class: {ANEW}")
    files, labels = _tiny_training(root / "train", wnids)
    more_files, more_labels = _tiny_validation(root / "val", wnids)
    classes = _tiny_names(root / "words.txt", wnids)
    splits = stratified(torch.tensor(labels), classes, {"test": 0.1}, options.split_seed)
    splits["validation"] = torch.arange(len(files), len(files) + len(more_files))
    images = ImageFiles(files + more_files, options.image_size or 32)
    return DataSet("tiny-imagenet", classes, images, torch.tensor(labels + more_labels), splits)


def _fetch_tiny(root: Path) -> None:
    """Fetch the archive (237 MB), check its MD5 sum and unpack it: `root` exists whole or not at all."""
    fetch = library("torchvision.datasets.utils", f"--download of {TINY}").download_and_extract_archive
    temporary = root.with_name(f".{TINY}.tmp")
    with explain_fetching(TINY_URL, root.parent):
        shutil.rmtree(temporary, ignore_errors=True)
        fetch(TINY_URL, str(root.parent), extract_root=str(temporary), md5=TINY_MD5)
        os.replace(temporary / TINY, root)
        shutil.rmtree(temporary, ignore_errors=True)


def _tiny_training(folder: Path, wnids: list[str]) -> Labelled:
    images = [_jpegs(folder / wnid / "images") for wnid in wnids]
    counts = [len(files) for files in images]
    if min(counts) != max(counts):  # all have 500
        few = folder / wnids[counts.index(min(counts))] / "images"
        raise UserError(f"{few} has {min(counts)} images where other classes have {max(counts)}: {ANEW}")
    if max(counts) == 0:
        raise UserError(f"{folder} has no images (*.JPEG): {ANEW}")
    return sum(images, []), [label for label, count in enumerate(counts) for _ in range(count)]


def _tiny_validation(folder: Path, wnids: list[str]) -> Labelled:
    annotations = folder / "val_annotations.txt"
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    present = set(_jpegs(folder / "images"))
    files, labels = [], []
    for number, line in enumerate(_lines(annotations), start=1):
        name, wnid = (line.split("\t") + [""])[:2]
        if wnid not in label_of:
            raise UserError(f"{annotations}, line {number}: class '{wnid}' is not in wnids.txt: {ANEW}")
        file = os.path.join(folder, "images", name)
        if file not in present:
            raise UserError(f"{annotations}, line {number}: there is no image {file}: {ANEW}")
        files.append(file)
        labels.append(label_of[wnid])
    if not files or sorted(files) != sorted(present):
        raise UserError(f"{annotations} has {len(files)} lines for the {len(present)} images beside it: {ANEW}")
    return files, labels


def _tiny_names(path: Path, wnids: list[str]) -> list[str]:
    """Return 'goldfish (n01443537)', with the class in brackets because different classes share names."""
    if not path.is_file():
        return wnids
    words = dict(line.split("\t", 1) for line in _lines(path) if "\t" in line)
    return [f"{words[wnid].split(',')[0]} ({wnid})" if wnid in words else wnid for wnid in wnids]


def _jpegs(folder: Path) -> list[str]:
    with explain(OSError, what=f"the folder {folder} cannot be read", remedy=ANEW):
        return sorted(entry.path for entry in os.scandir(folder) if entry.name.endswith(".JPEG"))


def _lines(path: Path) -> list[str]:
    with explain(OSError, UnicodeDecodeError, what=f"{path} cannot be read", remedy=ANEW):
        return [line.rstrip() for line in path.read_text().splitlines() if line.strip()]


def load_folder(options: argparse.Namespace) -> DataSet:
    """Read images in a subfolder for each class, as torchvision's ImageFolder does.

    With DATA/train there are training images and, where there are such folders, those for validation (val, validation or
    valid) and test; else DATA itself is one tree of classes. A part without a folder is cut from the others: a tenth of
    each class.

    Raises:
        UserError: there are no images, a class has no training images, or a part has a class that training does not have.
    """
    if options.data is None:
        raise UserError("--dataset folder needs --data, the folder of images")
    root = Path(options.data)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: --data names the folder of images")
    one_tree = not (root / "train").is_dir()
    files, labels, classes = _image_folder(root if one_tree else root / "train")
    splits = {"train": torch.arange(len(files))}
    for part, names in () if one_tree else FOLDERS.items():
        folders = [root / name for name in names if (root / name).is_dir()]
        if len(folders) > 1:
            raise UserError(f"{folders[0]} and {folders[1]} both give the {part} images: keep one of them")
        for folder in folders:
            more_files, more_labels, names = _image_folder(folder, allow_empty=True)
            unknown = sorted(set(names) - set(classes))
            if unknown:
                message = f"the training images have no class '{unknown[0]}' ({root / 'train'})"
                raise UserError(f"{folder / unknown[0]}: {message}")
            splits[part] = torch.arange(len(files), len(files) + len(more_files))
            files, labels = files + more_files, labels + [classes.index(names[label]) for label in more_labels]
    missing = {part: 0.1 for part in FOLDERS if part not in splits}
    splits |= stratified(torch.tensor(labels)[splits["train"]], classes, missing, options.split_seed)
    return DataSet("folder", classes, ImageFiles(files, options.image_size or 32), torch.tensor(labels), splits)


def _image_folder(folder: Path, allow_empty: bool = False) -> tuple[list[str], list[int], list[str]]:
    datasets = library("torchvision.datasets", "--dataset folder")
    remedy = "images belong into a subfolder for each class"
    with explain(OSError, what=f"{folder} cannot be read", remedy=remedy):  # no class, or a class without images
        data = datasets.ImageFolder(folder, allow_empty=allow_empty)
    if not data.samples:
        raise UserError(f"{folder} has no images: {remedy}")
    return [file for file, _ in data.samples], data.targets, data.classes


def _data_folder(options: argparse.Namespace, name: str) -> Path:
    """Return the folder `name` of a data set: --data is this folder or the one that holds it."""
    folder = Path(options.data or "data")
    return folder if folder.name == name else folder / name


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: --download fetches it, --data names the folder that holds it")


def explain_fetching(url: str, folder: Path) -> AbstractContextManager:
    """Turn errors of fetching and unpacking `url` into UserErrors."""
    kinds = (OSError, EOFError, RuntimeError, tarfile.TarError, zipfile.BadZipFile)  # RuntimeError: the MD5 sum
    what = f"{url} could not be fetched to {folder}"
    return explain(*kinds, what=what, remedy="try again, or fetch and unpack it there by other means")


LOADERS = {
    "digits": load_digits,
    "cifar10": load_cifar,
    "cifar100": load_cifar,
    "tiny-imagenet": load_tiny_imagenet,
    "folder": load_folder,
}
