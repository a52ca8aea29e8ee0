"""Tiny ImageNet: 200 classes with 500 training and 50 validation images of 64x64 each, and test images without labels.

tiny-imagenet-200/wnids.txt                               a class a line
tiny-imagenet-200/words.txt                               class, tab, its names; may be missing
tiny-imagenet-200/train/<class>/images/<class>_<n>.JPEG
tiny-imagenet-200/val/images/val_<n>.JPEG
tiny-imagenet-200/val/val_annotations.txt                 file, tab, class, tab, the box of the object
"""

import os
import shutil
from pathlib import Path

from training.download import fetching, import_torchvision
from training.errors import UserError

NAME = "tiny-imagenet-200"
URL = f"http://cs231n.stanford.edu/{NAME}.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
ANEW = f"fetch the archive anew: delete {NAME} and use --download"


def read_tiny_imagenet(folder: Path, download: bool):
    """((files, labels) for training, the same for validation, class names); a label is a position in the sorted classes.

    `folder` is tiny-imagenet-200 itself or what holds it. Raises UserError where something is missing.
    """
    root = folder if folder.name == NAME else folder / NAME
    if download and not root.is_dir():
        fetch(root)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: --download fetches it, --data names the folder that holds it")
    wnids = sorted(_lines(root / "wnids.txt"))
    if not wnids:
        raise UserError(f"{root / 'wnids.txt'} names no class: {ANEW}")
    return _training(root / "train", wnids), _validation(root / "val", wnids), _names(root / "words.txt", wnids)


def fetch(root: Path) -> None:
    """Fetches the archive (237 MB), checks its MD5 sum and unpacks it: `root` exists whole or not at all."""
    import_torchvision(f"--download of {NAME}")
    from torchvision.datasets.utils import download_and_extract_archive

    temporary = root.with_name(f".{NAME}.tmp")
    with fetching(URL, root.parent):
        shutil.rmtree(temporary, ignore_errors=True)
        download_and_extract_archive(URL, str(root.parent), extract_root=str(temporary), md5=MD5)
        os.replace(temporary / NAME, root)
        shutil.rmtree(temporary, ignore_errors=True)


def _training(folder: Path, wnids: list[str]) -> tuple[list[str], list[int]]:
    images = [_images(folder / wnid / "images") for wnid in wnids]
    counts = [len(files) for files in images]
    if min(counts) != max(counts):  # all have 500
        few = folder / wnids[counts.index(min(counts))] / "images"
        raise UserError(f"{few} has {min(counts)} images where other classes have {max(counts)}: {ANEW}")
    if max(counts) == 0:
        raise UserError(f"{folder} has no images (*.JPEG): {ANEW}")
    return sum(images, []), [label for label, count in enumerate(counts) for _ in range(count)]


def _validation(folder: Path, wnids: list[str]) -> tuple[list[str], list[int]]:
    annotations = folder / "val_annotations.txt"
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    present = set(_images(folder / "images"))
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


def _names(path: Path, wnids: list[str]) -> list[str]:
    """'goldfish (n01443537)', with the class in brackets because different classes share names."""
    if not path.is_file():
        return wnids
    words = dict(line.split("\t", 1) for line in _lines(path) if "\t" in line)
    return [f"{words[wnid].split(',')[0]} ({wnid})" if wnid in words else wnid for wnid in wnids]


def _images(folder: Path) -> list[str]:
    try:
        return sorted(entry.path for entry in os.scandir(folder) if entry.name.endswith(".JPEG"))
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read ({error.strerror}): {ANEW}") from error


def _lines(path: Path) -> list[str]:
    try:
        return [line.rstrip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): {ANEW}") from error
