"""Batches: their pixels, their order, and that neither depends on where and how they are made."""

import os
from types import SimpleNamespace

import data_cases as data
import pytest
import torch
import torch.nn.functional as F
from training.data import loader as loader_module
from training.data.augment import draw_plan
from training.data.images import ImageFiles, Images
from training.data.loader import Loader, fits, statistics
from training.errors import UserError
from training.processes import Processes

WAYS = pytest.mark.parametrize("data_in", ["memory", "workers"])


def make(dataset, split="train", *, rank=0, world_size=1, device="cpu", mean=None, std=None, augment=True, **options):
    """Return a loader whose default mean and deviation no data set has, so that leaving them out shows."""
    mean = torch.linspace(0.3, 0.5, dataset.images.channels) if mean is None else mean
    std = torch.linspace(0.2, 0.4, dataset.images.channels) if std is None else std
    defaults = dict(batch_size=8, seed=0, pad=4, flip=False, data_in="auto", workers=2, channels_last=False)
    processes = Processes(rank, world_size, torch.device(device))
    return Loader(dataset, split, SimpleNamespace(**{**defaults, **options}), processes, mean, std, augment)


def take(loader, epoch=0, start=0):
    try:
        return list(loader.epoch(epoch, start))
    finally:
        loader.close()


def batches(dataset, *arguments, epoch=0, **options):
    """Return the batches of an epoch of a loader."""
    return take(make(dataset, *arguments, **options), epoch)


def assert_same(first, second):
    assert len(first) == len(second)
    for (images, labels), (other_images, other_labels) in zip(first, second, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


def numbered_set(count=50, size=8):
    """Return a set whose image number i has color i throughout and label i, so that a batch shows which images it has."""
    dataset = data.memory_set(count, channels=1, size=size, classes=count)
    colors = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    dataset.images.pixels = colors.expand(-1, 1, size, size).contiguous()
    return dataset


# Pixels


def reference_image(image, row, column, mirrored, pad, mean, std):
    """Normalize, pad with zeros, crop and mirror one image [C, S, S] by the library's operations in float64."""
    size = image.shape[-1]
    normalized = (image.double() / 255 - mean.double().view(-1, 1, 1)) / std.double().view(-1, 1, 1)
    cropped = F.pad(normalized, (pad, pad, pad, pad))[:, row : row + size, column : column + size]
    return cropped.flip(-1) if mirrored else cropped


@pytest.mark.parametrize("pad, flip", [(4, True), (4, False), (2, True), (0, True), (0, False), (9, True)])
def test_augmentation_against_one_image_at_a_time(pad, flip):
    """Padding of 9 is more than the 8 pixels of the image: some crops hold nothing of it."""
    dataset = data.memory_set()
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    train = dataset.splits["train"]
    plan = draw_plan(len(train), seed=5, epoch=3, pad=pad, flip=flip)
    produced = batches(dataset, pad=pad, flip=flip, mean=mean, std=std, seed=5, epoch=3)
    images, labels = (torch.cat(parts) for parts in zip(*produced, strict=True))
    for (position, row, column, mirrored), image, label in zip(plan, images, labels, strict=True):
        source = train[position]
        expected = reference_image(dataset.images[source], row, column, mirrored, pad, mean, std)
        torch.testing.assert_close(image.double(), expected, rtol=1e-5, atol=1e-6)  # float32: 24 bits, values below 5
        assert label == dataset.labels[source]


def test_all_shifts_and_flips_are_drawn():
    _, rows, columns, flips = draw_plan(20000, seed=0, epoch=0, pad=4, flip=True).unbind(1)
    counts = (9 * rows + columns).bincount(minlength=81)
    # 247 expected each, deviation 15.6: five deviations.
    assert counts.numel() == 81 and (counts - 20000 / 81).abs().max() < 80
    assert abs(flips.float().mean() - 0.5) < 0.018
    assert not draw_plan(20000, seed=0, epoch=0, pad=4, flip=False)[:, 3].any()


def test_statistics_normalize_the_training_split():
    """Check float64 statistics to 1e-10; in float32 images the mean is 0 and the deviation 1 to rounding."""
    dataset = data.memory_set(count=200)
    dataset.images.pixels[190:] = 255  # the validation images have no part in it
    mean, std = statistics(dataset)
    pixels = dataset.images.pixels[:190].double() / 255
    assert mean.dtype == std.dtype == torch.float64
    torch.testing.assert_close(mean, pixels.mean((0, 2, 3)), rtol=1e-10, atol=0)
    torch.testing.assert_close(std, pixels.std((0, 2, 3), correction=0), rtol=1e-10, atol=0)
    images = torch.cat([images for images, _ in batches(dataset, mean=mean, std=std, pad=0, batch_size=10)]).double()
    assert len(images) == 190
    assert images.mean((0, 2, 3)).abs().max() < 1e-6 and (images.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-6


def test_statistics_of_one_color():
    with pytest.raises(UserError, match="one color in a channel"):
        statistics(numbered_set(count=11))


def test_dtype_and_memory_format():
    plain, turned = (batches(data.memory_set(), channels_last=channels_last) for channels_last in (False, True))
    assert all(images.dtype == torch.float32 and images.is_contiguous() for images, _ in plain)
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in turned)
    assert_same(plain, turned)


@pytest.mark.parametrize("split, images", [("validation", slice(40, 50)), ("train", slice(0, 40))])
def test_evaluation_has_no_augmentation(split, images):
    dataset = data.memory_set()
    ((found, labels),) = batches(dataset, split, batch_size=40, flip=True, augment=False)
    mean, std = torch.linspace(0.3, 0.5, 3).view(-1, 1, 1), torch.linspace(0.2, 0.4, 3).view(-1, 1, 1)
    expected = (dataset.images.pixels[images].double() / 255 - mean) / std
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(labels, dataset.labels[images])


# Order


def numbers(produced):
    """Return the numbers of the images of each batch of a numbered set."""
    return [labels.tolist() for _, labels in produced]


def test_training_order():
    """40 images make three batches of 12: each image is there at most once, others are left out the next time."""
    loader = make(numbered_set(), batch_size=12)
    assert loader.steps == 3
    epochs = [sum(numbers(take(loader, epoch)), []) for epoch in range(4)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 36 and max(epoch) < 40
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert set(sum(epochs, [])) == set(range(40))


def test_labels_belong_to_their_images():
    for images, labels in batches(numbered_set(), pad=0, mean=torch.zeros(1), std=torch.ones(1) / 255):
        torch.testing.assert_close(images[:, 0, 0, 0], labels.float(), rtol=1e-5, atol=0)


def test_training_depends_on_seed_and_epoch_alone():
    first = batches(data.memory_set(), flip=True, seed=1, epoch=2)
    torch.rand(3)  # the global generator has no part in it
    again = make(data.memory_set(), flip=True, seed=1)
    list(again.epoch(0))  # nor have earlier epochs
    assert_same(first, take(again, epoch=2))
    other = batches(data.memory_set(), flip=True, seed=2, epoch=1)
    assert not torch.equal(first[0][0], other[0][0])


@WAYS
def test_global_generator_is_left_alone(data_in):
    """Else a run that is resumed within an epoch would have other masks of Drop-Channel than one that is not."""
    state = torch.get_rng_state()
    batches(data.memory_set(), flip=True, data_in=data_in)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batches_of_one(processes):
    together = batches(data.memory_set(), batch_size=16, flip=True, epoch=1)
    share = dict(batch_size=16 // processes, flip=True, world_size=processes, epoch=1)
    each = [batches(data.memory_set(), rank=rank, **share) for rank in range(processes)]
    joined = [tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True)) for parts in zip(*each, strict=True)]
    assert_same(together, joined)


@WAYS
def test_start_within_an_epoch(data_in):
    loader = make(data.memory_set(), flip=True, data_in=data_in)
    whole = list(loader.epoch(3))
    assert len(whole) == loader.steps == 5
    for start in (0, 1, 4, 5):
        assert_same(whole[start:], list(loader.epoch(3, start)))
    loader.close()


def test_epoch_that_is_left_early():
    """Batches that worker processes have read ahead do not get into the next epoch."""
    loader = make(data.memory_set(), data_in="workers")
    left = loader.epoch(0)
    next(left)
    assert_same(batches(data.memory_set(), data_in="memory", epoch=1), take(loader, epoch=1))


@WAYS
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_is_complete_and_in_order(processes, data_in):
    dataset, test = numbered_set(), [49, 3, 17, 5, 8, 30, 21]
    dataset.splits["test"] = torch.tensor(test)
    for rank in range(processes):
        loader = make(dataset, "test", batch_size=2, rank=rank, world_size=processes, data_in=data_in)
        produced = numbers(take(loader))
        assert len(produced) == loader.steps and all(len(batch) == 2 for batch in produced[:-1])
        assert sum(produced, []) == test[rank::processes]


def test_more_processes_than_images():
    dataset = data.memory_set()
    dataset.splits["test"] = torch.tensor([4])
    loaders = [make(dataset, "test", rank=rank, world_size=2) for rank in range(2)]
    assert [loader.steps for loader in loaders] == [1, 0] == [len(take(loader)) for loader in loaders]


def test_too_few_images_for_a_step():
    message = "the 40 images of the split 'train' are fewer than the 64 of one step .*32, 2 proc"
    with pytest.raises(UserError, match=message):
        make(data.memory_set(), batch_size=32, world_size=2)


# Memory and worker processes


def test_worker_processes_give_the_same_batches(tmp_path):
    data.write_tiny_imagenet(tmp_path)
    first, second = (data.read("tiny-imagenet", tmp_path) for _ in range(2))
    for split in ("train", "validation"):
        memory = make(first, split, data_in="memory", flip=True)
        workers = make(second, split, data_in="workers", flip=True)
        assert memory.in_memory and not workers.in_memory
        for epoch in range(2):
            assert_same(list(memory.epoch(epoch)), list(workers.epoch(epoch)))
        workers.close()
    assert first.images.pixels is not None and second.images.pixels is None
    assert_same(batches(second, data_in="workers", workers=0), batches(first))  # in this process


def test_images_in_files_are_decoded_once(tmp_path, monkeypatch):
    """Statistics leave decoded images for the loader where it will hold them in memory anyway."""
    data.write_tiny_imagenet(tmp_path)
    decoded, decode = [], ImageFiles.__getitem__
    monkeypatch.setattr(ImageFiles, "__getitem__", lambda self, index: decoded.append(index) or decode(self, index))
    dataset = data.read("tiny-imagenet", tmp_path)
    expected = statistics(dataset)
    batches(dataset)
    assert sorted(decoded) == sorted(dataset.splits["train"].tolist())
    decoded.clear()
    dataset = data.read("tiny-imagenet", tmp_path)
    passing = statistics(dataset, data_in="workers")
    assert dataset.images.pixels is None and len(decoded) == len(dataset.splits["train"])
    assert torch.equal(expected[0], passing[0]) and torch.equal(expected[1], passing[1])


def test_images_in_memory_are_not_copied_on_the_cpu():
    dataset = data.memory_set()
    assert make(dataset)._pixels.data_ptr() == dataset.images.pixels.data_ptr()


def test_limit_of_images_in_memory(monkeypatch):
    """Images in files may take a quarter of the free memory; images in memory stay there whatever their size."""
    cpu = torch.device("cpu")
    files = ImageFiles(["a"] * 10, size=32)  # 30,720 bytes
    for free, world_size, held in [(122_881, 1, True), (122_880, 1, False), (122_881, 2, False)]:
        monkeypatch.setattr(loader_module, "_free_host_memory", lambda free=free: free)
        assert fits(files, cpu, world_size=world_size) == held
    assert fits(files, cpu, "memory") and not fits(files, cpu, "workers")
    images = Images(torch.zeros(100, 3, 32, 32, dtype=torch.uint8))
    assert fits(images, cpu)
    for free, held in [(4 * images.nbytes + 1, True), (4 * images.nbytes, False)]:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * free))
        assert fits(images, torch.device("cuda")) == held


def test_free_memory_of_this_machine():
    assert 1e8 < loader_module._free_host_memory() < 1e15


@pytest.mark.parametrize("data_in, workers", [("workers", 2), ("workers", 0), ("memory", 2)])
def test_truncated_image(tmp_path, data_in, workers):
    """The message names the file, without the traceback of the process that met it."""
    dataset = data.read("folder", data.write_folder(tmp_path, per_class=40))
    bad = dataset.images.files[dataset.splits["train"][7]]
    data.truncate(bad)
    with pytest.raises(UserError) as caught:
        batches(dataset, data_in=data_in, workers=workers)
    assert str(caught.value).startswith(f"{bad} cannot be read as an image") and "Traceback" not in str(caught.value)
    with pytest.raises(UserError, match=f"{bad} cannot be read"):
        statistics(data.read("folder", tmp_path), data_in, workers)


class Killer(Images):
    """Images that end the process that reads one, as the kernel does where memory runs out."""

    def __getitem__(self, index):
        os._exit(1)


def test_worker_process_that_is_killed():
    dataset = data.memory_set()
    dataset.images = Killer(dataset.images.pixels)
    with pytest.raises(UserError, match="a worker process that reads images failed .*--workers 0.*--data-in memory"):
        batches(dataset, data_in="workers")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@WAYS
def test_batches_on_a_gpu(data_in):
    """Batches are those of the CPU to rounding of float32, and nothing waits for the device."""
    on_cpu = batches(data.memory_set(), flip=True, epoch=1)
    loader = make(data.memory_set(), flip=True, device="cuda", data_in=data_in)
    list(loader.epoch(0))
    epoch = loader.epoch(1)
    on_gpu = [next(epoch)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu += list(epoch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        loader.close()
    assert loader.in_memory == (data_in == "memory")
    if loader.in_memory:  # only the images of the split
        assert loader._pixels.is_cuda and loader._pixels.nbytes == 40 * 3 * 8 * 8
    for (images, labels), (gpu_images, gpu_labels) in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(images, gpu_images.cpu(), rtol=1e-5, atol=1e-6)
        assert torch.equal(labels, gpu_labels.cpu())
