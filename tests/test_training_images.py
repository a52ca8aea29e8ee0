"""The data sets of examples/training that are files of images: Tiny ImageNet, a folder of images, and single images."""

import functools
import http.server
import threading
import zipfile

import numpy
import pytest
import torch
import torch.nn.functional as F
from data_cases import (
    assert_partition,
    class_counts,
    data_options,
    truncate,
    write_folder,
    write_image,
    write_tiny_imagenet,
)
from PIL import Image
from training import tiny_imagenet
from training.datasets import load
from training.errors import UserError
from training.sources import FileSource, read_image

# Tiny ImageNet


def test_tiny_imagenet(tmp_path):
    root = write_tiny_imagenet(tmp_path)
    dataset = load(data_options("tiny-imagenet", tmp_path))
    assert_partition(dataset, 36)
    assert dataset.classes == ["word 88 (n00000088)", "word 89 (n00000089)", "n00000090"]  # sorted; one has no word
    assert [class_counts(dataset, split) for split in ("train", "validation", "test")] == [[9] * 3, [2] * 3, [1] * 3]
    assert dataset.pool.images is None and dataset.pool.nbytes == 36 * 3 * 32 * 32
    first = dataset.splits["validation"][0]
    assert dataset.classes[dataset.labels[first]] == "n00000090"
    assert torch.equal(dataset.pool.read(first), read_image(root / "val/images/val_0.JPEG", 32))
    assert load(data_options("tiny-imagenet", root, image_size=64)).pool.read(0).shape == (3, 64, 64)


def break_tiny(root, what):
    images = root / "train/n00000089/images"
    annotations = root / "val/val_annotations.txt"
    if what == "wnids":
        (root / "wnids.txt").unlink()
    elif what == "no class":
        images.rename(root / "gone")
    elif what == "empty class":
        for file in images.iterdir():
            file.unlink()
    elif what == "image of a class":
        (images / "n00000089_0.JPEG").unlink()
    elif what == "annotations":
        annotations.unlink()
    elif what == "unknown class":
        annotations.write_text(annotations.read_text().replace("n00000088", "n12345678"))
    elif what == "annotated image":
        (root / "val/images/val_3.JPEG").unlink()
    elif what == "line":
        annotations.write_text("".join(annotations.read_text().splitlines(keepends=True)[1:]))


@pytest.mark.parametrize(
    "what, message",
    [
        ("wnids", "wnids.txt cannot be read"),
        ("no class", "train/n00000089/images cannot be read .No such file"),
        ("empty class", "train/n00000089/images has 0 images where other classes have 10"),
        ("image of a class", "train/n00000089/images has 9 images where other classes have 10"),
        ("annotations", "val_annotations.txt cannot be read"),
        ("unknown class", "val_annotations.txt, line 3: class 'n12345678' is not in wnids.txt"),
        ("annotated image", "val_annotations.txt, line 4: there is no image .*val_3.JPEG"),
        ("line", "val_annotations.txt has 5 lines for the 6 images"),
    ],
)
def test_tiny_imagenet_that_is_wrong(tmp_path, what, message):
    break_tiny(write_tiny_imagenet(tmp_path), what)
    with pytest.raises(UserError, match=message + ".*--download"):
        load(data_options("tiny-imagenet", tmp_path))


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A server on this machine that has the archive of a small Tiny ImageNet: its file, and the requests so far."""
    served = tmp_path / "served"
    root = write_tiny_imagenet(served)
    with zipfile.ZipFile(served / "tiny-imagenet-200.zip", "w") as file:
        for path in root.rglob("*.*"):
            file.write(path, path.relative_to(served))
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(args)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(served)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(tiny_imagenet, "URL", f"http://127.0.0.1:{server.server_port}/tiny-imagenet-200.zip")
    yield served / "tiny-imagenet-200.zip", requests
    server.shutdown()
    server.server_close()


def test_tiny_imagenet_is_fetched_only_when_asked(archive, monkeypatch, tmp_path):
    utils = pytest.importorskip("torchvision.datasets.utils")
    file, requests = archive
    with pytest.raises(UserError, match="no folder .*tiny-imagenet-200: --download .*--data"):
        load(data_options("tiny-imagenet", tmp_path))
    assert not requests

    with pytest.raises(UserError, match="tiny-imagenet-200.zip could not be fetched .*corrupted"):  # another MD5 sum
        load(data_options("tiny-imagenet", tmp_path, download=True))
    assert requests and not (tmp_path / "tiny-imagenet-200").exists()

    monkeypatch.setattr(tiny_imagenet, "MD5", utils.calculate_md5(file))
    assert len(load(data_options("tiny-imagenet", tmp_path, download=True)).pool) == 36
    assert {path.name for path in tmp_path.iterdir()} == {"served", "tiny-imagenet-200", "tiny-imagenet-200.zip"}
    count = len(requests)
    load(data_options("tiny-imagenet", tmp_path, download=True))
    assert len(requests) == count  # it is there already


def test_archive_that_cannot_be_fetched(archive, tmp_path):
    pytest.importorskip("torchvision")
    file, _ = archive
    file.unlink()
    with pytest.raises(UserError, match="could not be fetched .*404"):
        load(data_options("tiny-imagenet", tmp_path, download=True))


# A folder of images


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("torchvision")
    return tmp_path / "images"


def test_one_tree_of_classes(folder):
    write_folder(folder, per_class=20)
    dataset = load(data_options("folder", folder))
    assert dataset.classes == ["cat", "dog"] and dataset.image_size == 32
    assert_partition(dataset, 40)
    assert [class_counts(dataset, s) for s in ("train", "validation", "test")] == [[16, 16], [2, 2], [2, 2]]
    for i in range(8):  # all sizes and modes
        image = dataset.pool.read(i)
        assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    assert "cat" in dataset.pool.files[0] and dataset.labels[0] == 0


def test_folders_for_the_splits(folder):
    write_folder(folder, ("train", "val", "test"))
    dataset = load(data_options("folder", folder))
    assert_partition(dataset, 60)
    for split, name in [("train", "train"), ("validation", "val"), ("test", "test")]:
        files = {dataset.pool.files[i] for i in dataset.splits[split]}
        assert len(files) == 20 and all(f"/{name}/" in file for file in files)
        assert class_counts(dataset, split) == [10, 10]


def test_splits_that_have_no_folder_are_cut_from_train(folder):
    write_folder(folder, ("train", "test"))
    dataset = load(data_options("folder", folder))
    assert [class_counts(dataset, s) for s in ("train", "validation", "test")] == [[9, 9], [1, 1], [10, 10]]
    assert all("/train/" in dataset.pool.files[i] for i in dataset.splits["validation"])


def test_labels_of_a_split_without_all_classes(folder):
    """The classes of each split are those of training, whatever their place in the split's own folder."""
    write_folder(folder, ("train",), classes=("ant", "cat", "dog"))
    write_folder(folder, ("test",), classes=("dog",))
    dataset = load(data_options("folder", folder))
    assert class_counts(dataset, "test") == [0, 0, 10]


def test_folders_that_are_wrong(folder, tmp_path):
    with pytest.raises(UserError, match="--dataset folder needs --data"):
        load(data_options("folder"))
    with pytest.raises(UserError, match="there is no folder .*images"):
        load(data_options("folder", folder))
    folder.mkdir()
    with pytest.raises(UserError, match="images: .*subfolder for each class"):
        load(data_options("folder", folder))
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="no valid file for the classes empty"):
        load(data_options("folder", folder))
    write_folder(tmp_path / "few", per_class=2)
    with pytest.raises(UserError, match="class 'cat' has 2 images, too few for train and validation and test"):
        load(data_options("folder", tmp_path / "few"))
    write_folder(tmp_path / "both", ("train", "val", "validation"), per_class=4)
    with pytest.raises(UserError, match="val and .*validation both give the validation images"):
        load(data_options("folder", tmp_path / "both"))
    write_folder(tmp_path / "other", ("train",))
    write_folder(tmp_path / "other", ("test",), classes=("cat", "fish"))
    with pytest.raises(UserError, match="test/fish: the training images have no class 'fish'"):
        load(data_options("folder", tmp_path / "other"))


# Images


def test_image_is_resized_and_cropped_in_the_centre(tmp_path):
    """Against PyTorch's bilinear antialiased resize; one level of 255 for the rounding of each of two passes."""
    path = write_image(tmp_path / "wide.png", size=(96, 64))
    pixels = torch.tensor(numpy.array(Image.open(path))).permute(2, 0, 1)
    expected = F.interpolate(pixels[None].float(), size=(32, 48), mode="bilinear", antialias=True)[0, :, :, 8:40]
    assert (read_image(path, 32).float() - expected).abs().max() <= 2
    path = write_image(tmp_path / "tall.png", size=(32, 50))  # nothing to resize
    assert torch.equal(read_image(path, 32), torch.tensor(numpy.array(Image.open(path))).permute(2, 0, 1)[:, 9:41])


def test_image_modes(tmp_path):
    grey = read_image(write_image(tmp_path / "grey.png", mode="L"), 32)
    assert grey.shape == (3, 32, 32) and torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    assert torch.equal(read_image(tmp_path / "grey.png", 32, channels=1), grey[:1])
    assert read_image(write_image(tmp_path / "alpha.png", mode="RGBA"), 32).shape == (3, 32, 32)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9])
def test_truncated_image(tmp_path, suffix, part):
    truncate(write_image(tmp_path / f"image.{suffix}", size=(200, 200)), part)
    with pytest.raises(UserError, match=f"image.{suffix} cannot be read as an image .*replace"):
        read_image(tmp_path / f"image.{suffix}", 32)


def test_missing_image_and_text_for_an_image(tmp_path):
    with pytest.raises(UserError, match="gone.png cannot be read"):
        read_image(tmp_path / "gone.png", 32)
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(UserError, match="text.png cannot be read .*cannot identify"):
        FileSource([tmp_path / "text.png"], 32).read(0)
