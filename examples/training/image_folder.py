"""A folder of one's own images, a subfolder a class, as torchvision's ImageFolder reads it."""

from pathlib import Path

from training.download import import_torchvision
from training.errors import UserError

PARTS = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}


def read_image_folder(root: Path) -> tuple[dict[str, tuple[list[str], list[int]]], list[str]]:
    """({part: (files, labels)}, class names). With `root`/train there are the parts 'train' and, where there are such
    folders, 'validation' (val, validation or valid) and 'test'; else `root` itself is one tree of classes, 'all'.

    Raises UserError without images, with a class without training images, or with one that training does not have.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: --data names the folder of images")
    if not (root / "train").is_dir():
        files, labels, classes = _read(root)
        return {"all": (files, labels)}, classes
    parts, classes = {}, []
    for part, names in PARTS.items():
        folders = [root / name for name in names if (root / name).is_dir()]
        if len(folders) > 1:
            raise UserError(f"{folders[0]} and {folders[1]} both give the {part} images: keep one of them")
        for folder in folders:
            files, labels, own = _read(folder, allow_empty=part != "train")
            classes = classes or own
            unknown = sorted(set(own) - set(classes))
            if unknown:
                raise UserError(
                    f"{folder / unknown[0]}: the training images have no class '{unknown[0]}' ({root / 'train'})"
                )
            parts[part] = files, [classes.index(own[label]) for label in labels]
    return parts, classes


def _read(folder: Path, allow_empty: bool = False) -> tuple[list[str], list[int], list[str]]:
    datasets = import_torchvision("--dataset folder").datasets
    try:
        data = datasets.ImageFolder(folder, allow_empty=allow_empty)
    except OSError as error:  # no class, or a class without images
        raise UserError(f"{folder}: {error}; images belong into a subfolder for each class") from error
    if not data.samples:
        raise UserError(f"{folder} has no images; they belong into a subfolder for each class")
    return [file for file, _ in data.samples], [label for _, label in data.samples], data.classes
