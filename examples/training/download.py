"""What needs torchvision: its import, and downloads, with messages that say what to do."""

from contextlib import contextmanager
from pathlib import Path

from training.errors import UserError


def import_torchvision(what: str):
    """torchvision with its data sets, which `what` needs; UserError where it is missing or does not fit PyTorch."""
    try:
        import torchvision
        import torchvision.datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: operators of another version of PyTorch
        raise UserError(
            f"{what} needs torchvision, which cannot be imported ({error}): pip install torchvision, in the release that "
            "belongs to the PyTorch installed here"
        ) from error
    return torchvision


@contextmanager
def fetching(url: str, folder: Path):
    """Turns what can go wrong while `url` is fetched and unpacked into `folder` into UserError."""
    import tarfile
    import zipfile

    try:
        yield
    except (OSError, EOFError, RuntimeError, tarfile.TarError, zipfile.BadZipFile) as error:  # RuntimeError: MD5 sum
        raise UserError(
            f"{url} could not be fetched to {folder} ({error}): try again, or fetch and unpack it there by other means"
        ) from error
