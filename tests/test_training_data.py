"""The data sets of examples/training that are read into memory, their splits, and what is said where something is wrong."""

import builtins
import json
import sys

import numpy
import pytest
import torch
from data_cases import (
    assert_partition,
    class_counts,
    data_options,
    memory_set,
    truncate,
    write_cifar,
    write_folder,
    write_tiny_imagenet,
)
from PIL import Image
from training.datasets import DataSet, load
from training.errors import UserError
from training.sources import MemorySource
from training.splits import check_splits, stratified, write_splits

# Splits


def test_stratified_parts_of_each_class():
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 3)[torch.randperm(153)]
    parts = stratified(labels, ["a", "b", "c"], {"validation": 0.1, "test": 0.2}, seed=0)
    counts = {name: labels[indices].bincount().tolist() for name, indices in parts.items()}
    assert counts == {"train": [70, 35, 1], "validation": [10, 5, 1], "test": [20, 10, 1]}
    assert torch.equal(torch.cat(list(parts.values())).sort().values, torch.arange(153))


def test_stratified_depends_on_the_seed_alone():
    labels = torch.arange(100) % 4
    first = stratified(labels, list("abcd"), {"test": 0.2}, seed=3)
    torch.rand(7)  # the global generator has no part in it
    again, other = (stratified(labels, list("abcd"), {"test": 0.2}, seed=seed) for seed in (3, 4))
    assert torch.equal(first["test"], again["test"])
    assert not torch.equal(first["test"], other["test"])


def test_class_with_too_few_images():
    with pytest.raises(UserError, match="class 'b' has 1 images, too few for train and test"):
        stratified(torch.tensor([0, 0, 1]), ["a", "b"], {"test": 0.1}, seed=0)


def test_splits_are_written_and_checked(tmp_path):
    path, options = tmp_path / "splits.json", data_options("memory")
    write_splits(path, memory_set(), options)
    check_splits(path, memory_set(), options)
    written = json.loads(path.read_text())
    assert written["counts"] == {"train": 40, "validation": 10} and written["indices"]["train"] == list(range(40))
    assert [file.name for file in tmp_path.iterdir()] == ["splits.json"]

    with pytest.raises(UserError, match="'split_seed' in .* differs: 0 then, 1 now"):
        check_splits(path, memory_set(), data_options("memory", split_seed=1))
    with pytest.raises(UserError, match="'images' in .* differs: 50 then, 60 now"):
        check_splits(path, memory_set(count=60), options)
    exchanged = memory_set()
    exchanged.splits["train"] = exchanged.splits["train"] + 1
    with pytest.raises(UserError, match="'indices' in .*splits.json differs"):
        check_splits(path, exchanged, options)


def test_damaged_or_unwritable_splits(tmp_path):
    with pytest.raises(UserError, match="splits.json cannot be read"):
        check_splits(tmp_path / "splits.json", memory_set(), data_options("memory"))
    (tmp_path / "splits.json").write_text('{"dataset": ')
    with pytest.raises(UserError, match="splits.json is damaged"):
        check_splits(tmp_path / "splits.json", memory_set(), data_options("memory"))
    with pytest.raises(UserError, match="missing/splits.json could not be written: No such file"):
        write_splits(tmp_path / "missing/splits.json", memory_set(), data_options("memory"))


# Digits


def test_digits():
    sklearn = pytest.importorskip("sklearn.datasets")
    digits = load(data_options("digits"))
    assert (digits.channels, digits.image_size, digits.flip, len(digits.classes)) == (1, 32, False, 10)
    assert_partition(digits, 1797)
    sizes = torch.tensor(sklearn.load_digits().target).bincount()
    assert class_counts(digits, "validation") == (sizes / 10).round().tolist()
    assert class_counts(digits, "test") == (sizes / 5).round().tolist()
    for index in (0, 1000):
        original = Image.fromarray(sklearn.load_digits().images[index].astype("float32") * 255 / 16)
        enlarged = torch.tensor(numpy.array(original.resize((32, 32), Image.Resampling.BILINEAR)))
        assert (digits.pool.read(index)[0] - enlarged).abs().max() < 0.51  # rounding
    assert digits.pool.images.max() == 255
    assert load(data_options("digits", image_size=16)).pool.images.shape == (1797, 1, 16, 16)


def test_missing_libraries(monkeypatch, tmp_path):
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] in ("sklearn", "torchvision"):
            raise ImportError(f"no {name}")
        return imported(name, *args, **kwargs)

    for module in [name for name in sys.modules if name.split(".")[0] in ("sklearn", "torchvision")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        load(data_options("digits"))
    with pytest.raises(UserError, match="cifar10 needs torchvision.*pip install torchvision"):
        load(data_options("cifar10", tmp_path))
    with pytest.raises(UserError, match="folder needs torchvision"):
        load(data_options("folder", write_folder(tmp_path / "images", per_class=1)))
    with pytest.raises(UserError, match="--download of tiny-imagenet-200 needs torchvision"):
        load(data_options("tiny-imagenet", tmp_path, download=True))
    write_tiny_imagenet(tmp_path)
    assert len(load(data_options("tiny-imagenet", tmp_path)).pool) == 36  # reading it does not need torchvision


# CIFAR


@pytest.fixture(params=["CIFAR10", "CIFAR100"])
def cifar(request, tmp_path, monkeypatch):
    """Name, folder and torchvision's class of a small CIFAR."""
    kind = getattr(pytest.importorskip("torchvision").datasets, request.param)
    return request.param.lower(), write_cifar(tmp_path, kind, monkeypatch), kind


def test_cifar(cifar):
    name, folder, kind = cifar
    dataset = load(data_options(name, folder.parent))
    files, classes = len(kind.train_list), len(dataset.classes)
    assert_partition(dataset, 10 * classes * (files + 1))
    assert class_counts(dataset, "validation") == [files] * classes  # a tenth
    assert class_counts(dataset, "train") == [9 * files] * classes
    reference = kind(folder.parent, train=False)
    test = dataset.splits["test"]
    assert torch.equal(dataset.pool.images[test], torch.from_numpy(reference.data).permute(0, 3, 1, 2))
    assert dataset.labels[test].tolist() == reference.targets
    assert dataset.classes == [f"class {c}" for c in range(classes)] and dataset.flip
    again, other = (
        load(data_options(name, folder, split_seed=seed)) for seed in (0, 1)
    )  # the folder itself serves too
    assert torch.equal(again.splits["train"], dataset.splits["train"])
    assert not torch.equal(other.splits["train"], dataset.splits["train"])
    assert torch.equal(other.splits["test"], test)


def test_cifar_files_that_are_wrong(cifar):
    name, folder, kind = cifar
    with pytest.raises(UserError, match="--image-size is 32"):
        load(data_options(name, folder.parent, image_size=64))
    bad = folder / kind.train_list[-1][0]
    truncate(bad)
    with pytest.raises(UserError, match=f"{bad} is damaged or incomplete"):
        load(data_options(name, folder.parent))
    bad.unlink()
    with pytest.raises(UserError, match=f"{bad} is missing: --download"):
        load(data_options(name, folder.parent))
    with pytest.raises(UserError, match="there is no folder .*elsewhere.*--download.*--data"):
        load(data_options(name, folder.parent / "elsewhere"))


def test_cifar_is_fetched_only_when_asked(cifar, monkeypatch, tmp_path):
    name, folder, kind = cifar
    asked = []

    def fetch(url, root, filename, md5):
        asked.append((url, md5))
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fetch)
    with pytest.raises(UserError, match="no folder"):
        load(data_options(name, tmp_path / "empty"))
    assert not asked
    with pytest.raises(UserError, match=f"{kind.url} could not be fetched to .*empty .*corrupted"):
        load(data_options(name, tmp_path / "empty", download=True))
    assert asked == [(kind.url, kind.tgz_md5)]
    load(data_options(name, folder.parent, download=True))  # complete already
    assert len(asked) == 1


# What holds for each


def test_wrong_labels():
    images = MemorySource(torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(UserError, match="'x' has 4 images but 3 labels"):
        DataSet("x", ["a", "b"], 1, 8, images, torch.tensor([0, 1, 0]), {})
    with pytest.raises(UserError, match="'x' has labels 0 to 2 for 2 classes"):
        DataSet("x", ["a", "b"], 1, 8, images, torch.tensor([0, 1, 2, 0]), {})


def test_options_that_are_wrong():
    with pytest.raises(UserError, match="--dataset must be one of digits, cifar10.*'mnist'"):
        load(data_options("mnist"))
    with pytest.raises(UserError, match="--image-size must be at least 1, it was 0"):
        load(data_options("digits", image_size=0))
