"""Batches of examples/training: their pixels, their order, and that neither depends on where and how they are made."""

import os

import pytest
import torch
import torch.nn.functional as F
from data_cases import data_options, memory_set, truncate, write_folder, write_tiny_imagenet
from training import loader as loader_module
from training.augment import Plan
from training.datasets import load
from training.errors import UserError
from training.loader import Loader, fits, statistics
from training.sources import FileSource, MemorySource


def make(dataset, split="train", batch_size=8, **others):
    """A loader on the CPU with statistics that no data set has, so that leaving them out shows."""
    mean, std = torch.linspace(0.3, 0.5, dataset.channels), torch.linspace(0.2, 0.4, dataset.channels)
    defaults = {"device": "cpu", "mean": mean, "std": std, "seed": 0, "train": split == "train", "workers": 2}
    return Loader(dataset, split, batch_size=batch_size, **{**defaults, **others})


def batches(loader, epoch=0, start=0):
    try:
        return list(loader.epoch(epoch, start))
    finally:
        loader.close()


def assert_same(first, second):
    assert len(first) == len(second)
    for (images, labels), (other_images, other_labels) in zip(first, second, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


def numbered_set(count=50, size=8):
    """Image number i has the colour i throughout and the label i: which images a loader gave can be read from them."""
    dataset = memory_set(count, channels=1, size=size, classes=count)
    dataset.pool.images = (
        torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, size, size).contiguous()
    )
    return dataset


# Pixels


def reference_image(image, offset, flip, pad, mean, std):
    """One image [C, S, S], by the library's operations in float64: normalised, padded with zeros, cropped, mirrored."""
    size = image.shape[-1]
    normalised = (image.double() / 255 - mean.double().view(-1, 1, 1)) / std.double().view(-1, 1, 1)
    row, column = offset.tolist()
    cropped = F.pad(normalised, (pad, pad, pad, pad))[:, row : row + size, column : column + size]
    return cropped.flip(-1) if flip else cropped


@pytest.mark.parametrize("pad, flip", [(4, True), (4, False), (2, True), (0, True), (0, False), (9, True)])
def test_augmentation_against_one_image_at_a_time(pad, flip):
    """Padding of 9 is more than the 8 pixels of the image: some crops hold nothing of it."""
    dataset = memory_set()
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    train = dataset.splits["train"]
    plan = Plan.draw(len(train), seed=5, epoch=3, pad=pad, flip=flip)
    produced = batches(make(dataset, pad=pad, flip=flip, mean=mean, std=std, seed=5), epoch=3)
    images, labels = (torch.cat(parts) for parts in zip(*produced, strict=True))
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        source = train[plan.order[i]]
        expected = reference_image(dataset.pool.images[source], plan.offsets[i], plan.flips[i], pad, mean, std)
        torch.testing.assert_close(image.double(), expected, rtol=1e-5, atol=1e-6)  # float32: 24 bits, values below 5
        assert label == dataset.labels[source]


def test_all_shifts_and_flips_are_drawn():
    plan = Plan.draw(20000, seed=0, epoch=0, pad=4, flip=True)
    counts = (9 * plan.offsets[:, 0] + plan.offsets[:, 1]).bincount(minlength=81)
    # 247 expected each, deviation 15.6: five deviations.
    assert counts.numel() == 81 and (counts - 20000 / 81).abs().max() < 80
    assert abs(plan.flips.float().mean() - 0.5) < 0.018
    assert not Plan.draw(20000, seed=0, epoch=0, pad=4, flip=False).flips.any()


def test_statistics_normalise_the_training_split():
    """float64 statistics to 1e-10; in float32 images the mean is 0 and the deviation 1 to rounding."""
    dataset = memory_set(count=200, channels=3)
    dataset.pool.images[190:] = 255  # what is not for training has no part in it
    mean, std = statistics(dataset)
    pixels = dataset.pool.images[dataset.splits["train"]].double() / 255
    assert mean.dtype == std.dtype == torch.float64
    torch.testing.assert_close(mean, pixels.mean((0, 2, 3)), rtol=1e-10, atol=0)
    torch.testing.assert_close(std, pixels.std((0, 2, 3), correction=0), rtol=1e-10, atol=0)
    produced = batches(make(dataset, mean=mean, std=std, pad=0, batch_size=10))
    images = torch.cat([images for images, _ in produced]).double()
    assert len(images) == 190
    assert images.mean((0, 2, 3)).abs().max() < 1e-6 and (images.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-6


def test_statistics_of_one_colour():
    with pytest.raises(UserError, match="one colour in a channel"):
        statistics(numbered_set(count=11))


def test_dtype_and_memory_format():
    dataset = memory_set()
    plain = batches(make(dataset))
    for images, _ in plain:
        assert images.dtype == torch.float32 and images.is_contiguous()
    turned = batches(make(dataset, channels_last=True))
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in turned)
    assert_same(plain, turned)
    halves = batches(make(dataset, dtype=torch.bfloat16))
    assert_same([(images.bfloat16(), labels) for images, labels in plain], halves)


# Order


def numbers(produced):
    """Numbers of the images of each batch of a numbered set."""
    return [labels.tolist() for _, labels in produced]


def test_training_order():
    """40 images in batches of 12: three, each image at most once, others left out the next time."""
    loader = make(numbered_set(), batch_size=12)
    assert loader.steps == 3
    epochs = [sum(numbers(batches(loader, epoch)), []) for epoch in range(4)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 36 and max(epoch) < 40
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert set(sum(epochs, [])) == set(range(40))


def test_labels_belong_to_their_images():
    for images, labels in batches(make(numbered_set(), pad=0, mean=torch.zeros(1), std=torch.ones(1) / 255)):
        torch.testing.assert_close(images[:, 0, 0, 0], labels.float(), rtol=1e-5, atol=0)


def test_training_depends_on_seed_and_epoch_alone():
    first = batches(make(memory_set(), flip=True, seed=1), epoch=2)
    torch.rand(3)  # the global generator has no part in it
    again = make(memory_set(), flip=True, seed=1)
    list(again.epoch(0))  # nor have earlier epochs
    assert_same(first, batches(again, epoch=2))
    other = batches(make(memory_set(), flip=True, seed=2), epoch=1)
    assert not torch.equal(first[0][0], other[0][0])


@pytest.mark.parametrize("data_in", ["memory", "workers"])
def test_global_generator_is_left_alone(data_in):
    """Else a run that is resumed within an epoch would have other masks of Drop-Channel than one that is not."""
    before = torch.get_rng_state()
    batches(make(memory_set(), flip=True, data_in=data_in))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batches_of_one(processes):
    together = batches(make(memory_set(), batch_size=16, flip=True), epoch=1)
    each = [
        batches(make(memory_set(), batch_size=16 // processes, flip=True, rank=r, world_size=processes), epoch=1)
        for r in range(processes)
    ]
    joined = [tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True)) for parts in zip(*each, strict=True)]
    assert_same(together, joined)


@pytest.mark.parametrize("data_in", ["memory", "workers"])
def test_start_within_an_epoch(data_in):
    loader = make(memory_set(), flip=True, data_in=data_in)
    whole = list(loader.epoch(3))
    assert len(whole) == loader.steps == 5
    for start in (0, 1, 4, 5):
        assert_same(whole[start:], list(loader.epoch(3, start)))
    loader.close()


def test_epoch_that_is_left_early():
    """What worker processes had read ahead of it does not get into the next."""
    loader = make(memory_set(), data_in="workers")
    expected = batches(make(memory_set(), data_in="memory"), epoch=1)
    left = loader.epoch(0)
    next(left)
    assert_same(expected, list(loader.epoch(1)))
    loader.close()


@pytest.mark.parametrize("data_in", ["memory", "workers"])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_is_complete_and_in_order(processes, data_in):
    dataset = numbered_set()
    dataset.splits["test"] = torch.tensor([49, 3, 17, 5, 8, 30, 21])
    produced = []
    for rank in range(processes):
        loader = make(dataset, "test", batch_size=2, rank=rank, world_size=processes, data_in=data_in)
        produced.append(numbers(batches(loader)))
        assert len(produced[-1]) == loader.steps
        assert all(len(batch) == 2 for batch in produced[-1][:-1])
        assert sum(produced[-1], []) == dataset.splits["test"][rank::processes].tolist()
    assert sorted(sum(sum(produced, []), [])) == sorted(dataset.splits["test"].tolist())


def test_evaluation_has_no_augmentation():
    dataset = memory_set()
    images, labels = batches(make(dataset, "validation", batch_size=10, pad=4, flip=True))[0]
    mean, std = torch.linspace(0.3, 0.5, 3).view(-1, 1, 1), torch.linspace(0.2, 0.4, 3).view(-1, 1, 1)
    expected = (dataset.pool.images[40:].double() / 255 - mean) / std
    torch.testing.assert_close(images.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(labels, dataset.labels[40:])


def test_more_processes_than_images():
    dataset = memory_set()
    dataset.splits["test"] = torch.tensor([4])
    loaders = [make(dataset, "test", rank=rank, world_size=2) for rank in range(2)]
    assert [loader.steps for loader in loaders] == [1, 0] == [len(batches(loader)) for loader in loaders]


def test_too_few_images_for_a_step():
    with pytest.raises(
        UserError, match="the 40 images of the split 'train' are fewer than the 64 of one step .*32, 2 proc"
    ):
        make(memory_set(), batch_size=32, world_size=2)


# Memory and worker processes


def test_worker_processes_give_the_same_batches(tmp_path):
    write_tiny_imagenet(tmp_path)
    first, second = (load(data_options("tiny-imagenet", tmp_path)) for _ in range(2))
    for split in ("train", "validation"):
        held, read = make(first, split, data_in="memory", flip=True), make(second, split, data_in="workers", flip=True)
        assert held.in_memory and not read.in_memory
        for epoch in range(2):
            assert_same(list(held.epoch(epoch)), list(read.epoch(epoch)))
        read.close()
    assert first.pool.images is not None and second.pool.images is None
    assert_same(batches(make(second, data_in="workers", workers=0)), batches(make(first)))  # in this process


def test_images_in_files_are_decoded_once(tmp_path, monkeypatch):
    """Statistics keep what they read where it will be held in memory anyway."""
    write_tiny_imagenet(tmp_path)
    decoded = []
    read = FileSource.read
    monkeypatch.setattr(FileSource, "read", lambda self, index: decoded.append(index) or read(self, index))
    dataset = load(data_options("tiny-imagenet", tmp_path))
    kept = statistics(dataset)
    batches(make(dataset))
    assert sorted(decoded) == sorted(dataset.splits["train"].tolist())
    decoded.clear()
    dataset = load(data_options("tiny-imagenet", tmp_path))
    passing = statistics(dataset, data_in="workers")
    assert dataset.pool.images is None and len(decoded) == len(dataset.splits["train"])
    assert torch.equal(kept[0], passing[0]) and torch.equal(kept[1], passing[1])


def test_memory_of_the_pool_is_not_copied_on_the_cpu():
    dataset = memory_set()
    assert make(dataset)._images.data_ptr() == dataset.pool.images.data_ptr()


def test_what_is_held_in_memory(monkeypatch):
    """A quarter of what is free; images in memory already are held there whatever their size."""
    cpu = torch.device("cpu")
    files = FileSource(["a"] * 10, size=32)  # 30,720 bytes
    for free, world_size, held in [(122_881, 1, True), (122_880, 1, False), (122_881, 2, False)]:
        monkeypatch.setattr(loader_module, "_free_host_memory", lambda free=free: free)
        assert fits(files, cpu, world_size=world_size) == held
    assert fits(files, cpu, "memory") and not fits(files, cpu, "workers")
    images = MemorySource(torch.zeros(100, 3, 32, 32, dtype=torch.uint8))
    assert fits(images, cpu)
    for free, held in [(4 * images.nbytes + 1, True), (4 * images.nbytes, False)]:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * free))
        assert fits(images, torch.device("cuda")) == held


def test_free_memory_of_this_machine():
    assert 1e8 < loader_module._free_host_memory() < 1e15


@pytest.mark.parametrize("data_in, workers", [("workers", 2), ("workers", 0), ("memory", 2)])
def test_truncated_image(tmp_path, data_in, workers):
    """It is named, without the traceback of the process that met it."""
    pytest.importorskip("torchvision")
    write_folder(tmp_path, per_class=40)
    dataset = load(data_options("folder", tmp_path))
    bad = dataset.pool.files[dataset.splits["train"][7]]
    truncate(bad)
    with pytest.raises(UserError) as caught:
        loader = make(dataset, data_in=data_in, workers=workers)
        list(loader.epoch(0))
    assert str(caught.value).startswith(f"{bad} cannot be read as an image") and "Traceback" not in str(caught.value)
    with pytest.raises(UserError, match=f"{bad} cannot be read"):
        statistics(load(data_options("folder", tmp_path)), data_in, workers)


class Killed(MemorySource):
    """Ends the process that reads from it, as the kernel does where memory runs out."""

    def read(self, index):
        os._exit(1)


def test_worker_process_that_is_killed():
    dataset = memory_set()
    dataset.pool = Killed(dataset.pool.images)
    loader = make(dataset, data_in="workers")
    with pytest.raises(UserError, match="a worker process that reads images failed .*--workers 0.*--data-in memory"):
        list(loader.epoch(0))


def test_time_waited():
    loader = make(memory_set())
    assert loader.waited == 0
    list(loader.epoch(0))
    assert 0 < loader.waited < 5
    loader.reset()
    assert loader.waited == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("data_in", ["memory", "workers"])
def test_batches_on_a_gpu(data_in):
    """Those of the CPU to rounding of float32, made without waiting for the device."""
    dataset = memory_set()
    on_cpu = batches(make(dataset, flip=True), epoch=1)
    loader = make(dataset, flip=True, device="cuda", data_in=data_in)
    list(loader.epoch(0))
    epoch = loader.epoch(1)
    on_gpu = [next(epoch)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu += list(epoch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        loader.close()
    assert loader.device_bytes == (40 * 3 * 8 * 8 if data_in == "memory" else 0)
    for (images, labels), (there, labels_there) in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(images, there.cpu(), rtol=1e-5, atol=1e-6)
        assert torch.equal(labels, labels_there.cpu())
