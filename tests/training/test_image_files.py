"""The data sets that are files of images: Tiny ImageNet, a folder of images, and single images."""

import functools
import http.server
import shutil
import threading
import zipfile

import data_cases as data
import numpy
import pytest
import torch
import torch.nn.functional as F
from training.data import sets
from training.data.images import ImageFiles, read_image
from training.errors import UserError

SPLITS = ("train", "validation", "test")

# Tiny ImageNet


def test_tiny_imagenet(tmp_path):
    root = data.write_tiny_imagenet(tmp_path)
    dataset = data.read("tiny-imagenet", tmp_path)
    data.assert_partition(dataset, 36)
    assert dataset.classes == ["word 88 (n00000088)", "word 89 (n00000089)", "n00000090"]  # sorted; one has no word
    assert data.class_counts(dataset, *SPLITS) == [[9] * 3, [2] * 3, [1] * 3]
    assert dataset.images.pixels is None and dataset.images.nbytes == 36 * 3 * 32 * 32
    first = dataset.splits["validation"][0]
    assert dataset.classes[dataset.labels[first]] == "n00000090"
    assert torch.equal(dataset.images[first], read_image(root / "val/images/val_0.JPEG", 32))
    assert data.read("tiny-imagenet", root, image_size=64).images[0].shape == (3, 64, 64)


IMAGES, ANNOTATIONS = "train/n00000089/images", "val/val_annotations.txt"


def rewrite(change):
    """Return a function of the folder that rewrites the annotations."""
    return lambda root: (root / ANNOTATIONS).write_text(change((root / ANNOTATIONS).read_text()))


def empty(root):
    shutil.rmtree(root / IMAGES)
    (root / IMAGES).mkdir()


DAMAGES = {
    "wnids.txt cannot be read": lambda root: (root / "wnids.txt").unlink(),
    "wnids.txt names no class": lambda root: (root / "wnids.txt").write_text("\n"),
    "images cannot be read .No such file": lambda root: shutil.rmtree(root / IMAGES),
    f"{IMAGES} has 0 images where other classes have 10": empty,
    f"{IMAGES} has 9 images where other classes have 10": lambda root: (root / IMAGES / "n00000089_0.JPEG").unlink(),
    "val_annotations.txt cannot be read": lambda root: (root / ANNOTATIONS).unlink(),
    "line 3: class 'n12345678' is not in wnids.txt": rewrite(lambda text: text.replace("n00000088", "n12345678")),
    "line 4: there is no image .*val_3.JPEG": lambda root: (root / "val/images/val_3.JPEG").unlink(),
    "val_annotations.txt has 5 lines for the 6 images": rewrite(lambda text: text.partition("\n")[2]),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_tiny_imagenet_that_is_wrong(tmp_path, message):
    DAMAGES[message](data.write_tiny_imagenet(tmp_path))
    data.refuses(message + ".*--download", "tiny-imagenet", tmp_path)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A server on this machine that has the archive of a small Tiny ImageNet: its file, and the requests so far."""
    served = tmp_path / "served"
    root = data.write_tiny_imagenet(served)
    with zipfile.ZipFile(served / "tiny-imagenet-200.zip", "w") as file:
        for path in root.rglob("*.*"):
            file.write(path, path.relative_to(served))
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(args)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(served)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(sets, "TINY_URL", f"http://127.0.0.1:{server.server_port}/tiny-imagenet-200.zip")
    yield served / "tiny-imagenet-200.zip", requests
    server.shutdown()
    server.server_close()


def test_tiny_imagenet_is_fetched_only_when_asked(archive, monkeypatch, tmp_path):
    from torchvision.datasets.utils import calculate_md5

    file, requests = archive
    data.refuses("no folder .*tiny-imagenet-200: --download .*--data", "tiny-imagenet", tmp_path)
    assert not requests

    data.refuses(
        "200.zip could not be fetched .*corrupted", "tiny-imagenet", tmp_path, download=True
    )  # another MD5 sum
    assert requests and not (tmp_path / "tiny-imagenet-200").exists()

    monkeypatch.setattr(sets, "TINY_MD5", calculate_md5(file))
    assert len(data.read("tiny-imagenet", tmp_path, download=True).images) == 36
    assert {path.name for path in tmp_path.iterdir()} == {"served", "tiny-imagenet-200", "tiny-imagenet-200.zip"}
    count = len(requests)
    data.read("tiny-imagenet", tmp_path, download=True)
    assert len(requests) == count  # there is nothing left to fetch


def test_archive_that_cannot_be_fetched(archive, tmp_path):
    archive[0].unlink()
    data.refuses("could not be fetched .*404", "tiny-imagenet", tmp_path, download=True)


# A folder of images


def test_one_tree_of_classes(tmp_path):
    dataset = data.read("folder", data.write_folder(tmp_path, per_class=20))
    assert dataset.classes == ["cat", "dog"] and dataset.images.size == 32
    data.assert_partition(dataset, 40)
    assert data.class_counts(dataset, *SPLITS) == [[16, 16], [2, 2], [2, 2]]
    for i in range(8):  # all sizes and modes
        assert dataset.images[i].shape == (3, 32, 32) and dataset.images[i].dtype == torch.uint8
    assert "cat" in dataset.images.files[0] and dataset.labels[0] == 0


def test_folders_for_the_splits(tmp_path):
    dataset = data.read("folder", data.write_folder(tmp_path, ("train", "val", "test")))
    data.assert_partition(dataset, 60)
    assert data.class_counts(dataset, *SPLITS) == [[10, 10]] * 3
    for split, name in zip(SPLITS, ("train", "val", "test"), strict=True):
        files = {dataset.images.files[i] for i in dataset.splits[split]}
        assert len(files) == 20 and all(f"/{name}/" in file for file in files)


def test_splits_that_have_no_folder_are_cut_from_train(tmp_path):
    dataset = data.read("folder", data.write_folder(tmp_path, ("train", "test")))
    assert data.class_counts(dataset, *SPLITS) == [[9, 9], [1, 1], [10, 10]]
    assert all("/train/" in dataset.images.files[i] for i in dataset.splits["validation"])


def test_labels_of_a_split_without_all_classes(tmp_path):
    """The classes of each split are those of training, whatever their place in the split's own folder."""
    data.write_folder(tmp_path, ("train",), classes=("ant", "cat", "dog"))
    data.write_folder(tmp_path, ("test",), classes=("dog",))
    assert data.class_counts(data.read("folder", tmp_path), "test") == [[0, 0, 10]]


def test_folders_that_are_wrong(tmp_path):
    folder = tmp_path / "images"
    data.refuses("--dataset folder needs --data", "folder")
    data.refuses("there is no folder .*images", "folder", folder)
    folder.mkdir()
    data.refuses("images cannot be read .*subfolder for each class", "folder", folder)
    (folder / "empty").mkdir()
    data.refuses("no valid file for the classes empty", "folder", folder)
    data.write_folder(tmp_path / "few", per_class=2)
    data.refuses("class 'cat' has 2 images, too few for train and validation and test", "folder", tmp_path / "few")
    data.write_folder(tmp_path / "both", ("train", "val", "validation"), per_class=4)
    data.refuses("val and .*validation both give the validation images", "folder", tmp_path / "both")
    data.write_folder(tmp_path / "other", ("train",))
    data.write_folder(tmp_path / "other", ("test",), classes=("cat", "fish"))
    data.refuses("test/fish: the training images have no class 'fish'", "folder", tmp_path / "other")


# Images


def pixels_of(path):
    from PIL import Image

    return torch.tensor(numpy.array(Image.open(path))).permute(2, 0, 1)


def test_image_is_resized_and_cropped_in_the_center(tmp_path):
    """Compare with PyTorch's bilinear antialiased resize: one level of 255 for the rounding of each of two passes."""
    path = data.write_image(tmp_path / "wide.png", size=(96, 64))
    expected = F.interpolate(pixels_of(path)[None].float(), size=(32, 48), mode="bilinear", antialias=True)
    assert (read_image(path, 32).float() - expected[0, :, :, 8:40]).abs().max() <= 2
    path = data.write_image(tmp_path / "tall.png", size=(32, 50))  # nothing to resize
    assert torch.equal(read_image(path, 32), pixels_of(path)[:, 9:41])


def test_image_modes(tmp_path):
    grey = read_image(data.write_image(tmp_path / "grey.png", mode="L"), 32)
    assert grey.shape == (3, 32, 32) and torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    assert torch.equal(read_image(tmp_path / "grey.png", 32, channels=1), grey[:1])
    assert read_image(data.write_image(tmp_path / "alpha.png", mode="RGBA"), 32).shape == (3, 32, 32)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9])
def test_truncated_image(tmp_path, suffix, part):
    data.truncate(data.write_image(tmp_path / f"image.{suffix}", size=(200, 200)), part)
    with pytest.raises(UserError, match=f"image.{suffix} cannot be read as an image .*replace"):
        read_image(tmp_path / f"image.{suffix}", 32)


def test_missing_image_and_text_for_an_image(tmp_path):
    with pytest.raises(UserError, match="gone.png cannot be read"):
        read_image(tmp_path / "gone.png", 32)
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(UserError, match="text.png cannot be read .*cannot identify"):
        ImageFiles([tmp_path / "text.png"], 32)[0]
