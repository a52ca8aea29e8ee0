"""Small data sets in the formats of the real ones, which tests write to a temporary folder."""

import hashlib
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training.data.images import Images
from training.data.sets import DataSet, load
from training.errors import UserError


def options(dataset, data=None, **others):
    """Return the options that loading a data set reads."""
    defaults = {"download": False, "image_size": None, "split_seed": 0}
    return SimpleNamespace(dataset=dataset, data=data, **{**defaults, **others})


def read(*arguments, **others):
    """Load the data set of these `options`."""
    return load(options(*arguments, **others))


def refuses(message, *arguments, **others):
    """Assert that the data set of these `options` is refused."""
    with pytest.raises(UserError, match=message):
        read(*arguments, **others)


def memory_set(count=50, channels=3, size=8, classes=5, seed=0):
    """Return random images in memory, all of them for training but the last ten, which are for validation."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)
    splits = {"train": torch.arange(count - 10), "validation": torch.arange(count - 10, count)}
    return DataSet("memory", [str(c) for c in range(classes)], Images(pixels), torch.arange(count) % classes, splits)


def write_image(path, size=(64, 64), mode="RGB", seed=0):
    """Write a random image of `size` (width, height), coarse, so that JPEG keeps it."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (4, 4) if mode == "L" else (4, 4, len(mode))
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).resize(size).save(path)
    return path


def truncate(path, part=0.5):
    """Cut the file off, as an interrupted copy does."""
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: int(len(content) * part)])


def write_cifar(folder, kind, monkeypatch, per_class=10):
    """Write the files of CIFAR-10 or -100 (`kind`: class of torchvision) with `per_class` images a class in each, and let
    torchvision expect their MD5 sums."""
    classes, key = (10, "labels") if kind.base_folder == "cifar-10-batches-py" else (100, "fine_labels")
    folder = folder / kind.base_folder
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(seed):
        generator = np.random.default_rng(seed)
        labels = generator.permutation(np.repeat(np.arange(classes), per_class))
        return {"data": generator.integers(0, 256, (len(labels), 3072), dtype=np.uint8), key: labels.tolist()}

    for seed, attribute in enumerate(("train_list", "test_list")):
        files = [[name, write(name, batch(10 * seed + i))] for i, (name, _) in enumerate(getattr(kind, attribute))]
        monkeypatch.setattr(kind, attribute, files)
    md5 = write(kind.meta["filename"], {kind.meta["key"]: [f"class {c}" for c in range(classes)]})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5})
    return folder


def write_tiny_imagenet(folder, classes=3, per_class=10, validation=6):
    """Write the tree of Tiny ImageNet."""
    root = folder / "tiny-imagenet-200"
    wnids = [f"n{90 - c:08d}" for c in range(classes)]
    for number, wnid in enumerate(wnids):
        for i in range(per_class):
            write_image(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", seed=100 * number + i)
    for i in range(validation):
        write_image(root / "val/images" / f"val_{i}.JPEG", seed=1000 + i, mode="RGB" if i else "L")
    lines = [f"val_{i}.JPEG\t{wnids[i % classes]}\t0\t0\t62\t62\n" for i in range(validation)]
    (root / "val/val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in wnids))
    (root / "words.txt").write_text("".join(f"{wnid}\tword {wnid[-2:]}, other\n" for wnid in wnids[1:]))
    return root


def write_folder(root, parts=("",), classes=("cat", "dog"), per_class=10):
    """Write images of different sizes and modes to a subfolder for each class, once or under each of `parts`."""
    shapes = [((40, 30), "RGB", "jpg"), ((20, 50), "L", "png"), ((32, 32), "RGBA", "png"), ((8, 8), "RGB", "png")]
    for p, part in enumerate(parts):
        for c, name in enumerate(classes):
            for i in range(per_class):
                size, mode, suffix = shapes[i % len(shapes)]
                write_image(root / part / name / f"{i:02d}.{suffix}", size, mode, seed=1000 * p + 100 * c + i)
    return root


def assert_partition(dataset, count=None):
    """Assert that each image is in one split and no more."""
    indices = torch.cat(list(dataset.splits.values()))
    assert indices.unique().numel() == indices.numel() == len(dataset.images) == (count or len(dataset.images))
    assert set(dataset.splits) == {"train", "validation", "test"}


def class_counts(dataset, *splits):
    """Return the number of images of each class, for each split."""
    return [dataset.labels[dataset.splits[s]].bincount(minlength=len(dataset.classes)).tolist() for s in splits]
