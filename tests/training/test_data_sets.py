"""The data sets that are read into memory, their splits, and the messages where something is wrong."""

import json
import sys

import data_cases as data
import numpy
import pytest
import torch
from training.data.sets import stratified
from training.errors import UserError
from training.run_folder import check_splits, write_splits

# Splits


def test_stratified_parts_of_each_class():
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 3)[torch.randperm(153)]
    parts = stratified(labels, ["a", "b", "c"], {"validation": 0.1, "test": 0.2}, seed=0)
    counts = {name: labels[indices].bincount().tolist() for name, indices in parts.items()}
    assert counts == {"train": [70, 35, 1], "validation": [10, 5, 1], "test": [20, 10, 1]}
    assert torch.equal(torch.cat(list(parts.values())).sort().values, torch.arange(153))


def test_stratified_depends_on_the_seed_alone():
    first, again, other = (stratified(torch.arange(100) % 4, list("abcd"), {"test": 0.2}, seed=s) for s in (3, 3, 4))
    assert torch.equal(first["test"], again["test"])  # the global generator has moved on, if it was used
    assert not torch.equal(first["test"], other["test"])


def test_class_with_too_few_images():
    with pytest.raises(UserError, match="class 'b' has 1 images, too few for train and test"):
        stratified(torch.tensor([0, 0, 1]), ["a", "b"], {"test": 0.1}, seed=0)


def test_splits_are_written_and_checked(tmp_path):
    options, exchanged = data.options("memory"), data.memory_set()
    write_splits(tmp_path, data.memory_set(), options)
    check_splits(tmp_path, data.memory_set(), options)
    written = json.loads((tmp_path / "splits.json").read_text())
    assert written["counts"] == {"train": 40, "validation": 10} and written["indices"]["train"] == list(range(40))
    assert [file.name for file in tmp_path.iterdir()] == ["splits.json"]
    exchanged.splits["train"] = exchanged.splits["train"] + 1
    for message, dataset, seed in [
        ("'split_seed' in .* differs: 0 then, 1 now", data.memory_set(), 1),
        ("'images' in .* differs: 50 then, 60 now", data.memory_set(count=60), 0),
        ("'indices' in .*splits.json differs", exchanged, 0),
    ]:
        with pytest.raises(UserError, match=message):
            check_splits(tmp_path, dataset, data.options("memory", split_seed=seed))


def test_damaged_or_unwritable_splits(tmp_path):
    for message, content in [("read .No such file", None), ("splits.json cannot be read .Expecting", '{"dataset": ')]:
        if content is not None:
            (tmp_path / "splits.json").write_text(content)
        with pytest.raises(UserError, match=message):
            check_splits(tmp_path, data.memory_set(), data.options("memory"))
    with pytest.raises(UserError, match="missing/splits.json could not be written: No such file"):
        write_splits(tmp_path / "missing", data.memory_set(), data.options("memory"))


# Digits


def test_digits():
    from PIL import Image
    from sklearn.datasets import load_digits

    source, digits = load_digits(), data.read("digits")
    assert (digits.images.channels, digits.images.size, digits.flip, len(digits.classes)) == (1, 32, False, 10)
    data.assert_partition(digits, 1797)
    sizes = torch.tensor(source.target).bincount()
    assert data.class_counts(digits, "validation", "test") == [(sizes / n).round().tolist() for n in (10, 5)]
    for index in (0, 1000):
        original = Image.fromarray(source.images[index].astype("float32") * 255 / 16)
        enlarged = torch.tensor(numpy.array(original.resize((32, 32), Image.Resampling.BILINEAR)))
        assert (digits.images[index][0] - enlarged).abs().max() < 0.51  # rounding
    assert digits.images.pixels.max() == 255
    assert data.read("digits", image_size=16).images.pixels.shape == (1797, 1, 16, 16)


def test_missing_libraries(monkeypatch, tmp_path):
    data.write_folder(tmp_path / "images", per_class=1)
    for module in ("sklearn", "torchvision"):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, f"{module}.datasets", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets.utils", None)
    data.refuses("pip install scikit-learn", "digits")
    data.refuses("cifar10 needs torchvision.*pip install torchvision, in the release that belongs", "cifar10", tmp_path)
    data.refuses("folder needs torchvision", "folder", tmp_path / "images")
    data.refuses("--download of tiny-imagenet-200 needs torchvision", "tiny-imagenet", tmp_path, download=True)
    data.write_tiny_imagenet(tmp_path)
    assert len(data.read("tiny-imagenet", tmp_path).images) == 36  # reading it does not need torchvision


# CIFAR


@pytest.fixture(params=["CIFAR10", "CIFAR100"])
def cifar(request, tmp_path, monkeypatch):
    """Name, folder and torchvision's class of a small CIFAR."""
    from torchvision import datasets

    kind = getattr(datasets, request.param)
    return request.param.lower(), data.write_cifar(tmp_path, kind, monkeypatch), kind


def test_cifar(cifar):
    name, folder, kind = cifar
    dataset = data.read(name, folder.parent)
    files, classes = len(kind.train_list), len(dataset.classes)
    data.assert_partition(dataset, 10 * classes * (files + 1))
    assert data.class_counts(dataset, "validation", "train") == [[files] * classes, [9 * files] * classes]  # a tenth
    reference, test = kind(folder.parent, train=False), dataset.splits["test"]
    assert torch.equal(dataset.images.pixels[test], torch.from_numpy(reference.data).permute(0, 3, 1, 2))
    assert dataset.labels[test].tolist() == reference.targets
    assert dataset.classes == [f"class {c}" for c in range(classes)] and dataset.flip
    again, other = (data.read(name, folder, split_seed=seed) for seed in (0, 1))  # the folder itself serves too
    assert torch.equal(again.splits["train"], dataset.splits["train"])
    assert not torch.equal(other.splits["train"], dataset.splits["train"])
    assert torch.equal(other.splits["test"], test)


def test_cifar_files_that_are_wrong(cifar):
    name, folder, kind = cifar
    data.refuses("--image-size is 32", name, folder.parent, image_size=64)
    bad = folder / kind.train_list[-1][0]
    data.truncate(bad)
    data.refuses(f"{bad} is damaged or incomplete", name, folder.parent)
    bad.unlink()
    data.refuses(f"{bad} is missing: --download", name, folder.parent)
    data.refuses("there is no folder .*elsewhere.*--download.*--data", name, folder.parent / "elsewhere")


def test_cifar_is_fetched_only_when_asked(cifar, monkeypatch, tmp_path):
    name, folder, kind = cifar
    asked = []

    def fetch(url, root, filename, md5):
        asked.append((url, md5))
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fetch)
    data.refuses("no folder", name, tmp_path / "empty")
    assert not asked
    data.refuses(f"{kind.url} could not be fetched to .*empty .*corrupted", name, tmp_path / "empty", download=True)
    assert asked == [(kind.url, kind.tgz_md5)]
    data.read(name, folder.parent, download=True)  # complete already
    assert len(asked) == 1
