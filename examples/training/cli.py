"""The command line of the scripts: parsers, numbers within bounds, exit codes, signals."""

import argparse
import math
import operator
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from training.errors import UserError

MISTAKE = 2  # exit code for what the user can mend; argparse has the same
_delayed: list[int] | None = None  # signals that arrived inside hold_signals; None outside


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser without options, whose help shows `description` as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def make_run_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of a script that uses a trained network: RUN, --weights, --device."""
    parser = make_parser(description)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that train.py wrote")
    parser.add_argument("--weights", default="best", help="best (default), last, or a safetensors file")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; cuda if there is one by default")
    return parser


class Number:
    """A `type` of argparse: a finite int or float within bounds.

    Args:
        kind: int or float.
        bounds: at_least, more_than, at_most, less_than.
    """

    HOLDS = {"at least": operator.ge, "more than": operator.gt, "at most": operator.le, "less than": operator.lt}

    def __init__(self, kind: type, **bounds: float):
        self.kind = kind
        self.bounds = {name.replace("_", " "): bound for name, bound in bounds.items()}

    def __call__(self, text: str) -> int | float:
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        inside = all(self.HOLDS[words](value, bound) for words, bound in self.bounds.items())
        if not math.isfinite(value) or not inside:
            raise argparse.ArgumentTypeError(f"{text!r} is not valid; it must be {self}")
        return value

    def __str__(self) -> str:
        bounds = " and ".join(f"{words} {bound}" for words, bound in self.bounds.items())
        return f"{'an integer' if self.kind is int else 'a number'}{', ' * bool(bounds)}{bounds}"


def depth(text: str) -> int:
    """Read the depth of a network of three dense blocks: a `type` of argparse."""
    value = int(text) if text.isdecimal() else 0
    if value < 10 or (value - 4) % 6:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not valid; it must be 6n + 4 with n at least 1, such as 40 or 100"
        )
    return value


def run_script(main: Callable[[], object], interrupted: str = "") -> int:
    """Call `main` and return the exit code of the script.

    Args:
        main: raises UserError for what the user can mend; an OSError comes from a library that writes files itself.
        interrupted: added to the message after Ctrl-C or SIGTERM, which end the script with code 130 and 143.
    """
    rank = os.environ.get("RANK", "0")
    try:
        with _interrupted_by_signals():
            main()
        return 0
    except (UserError, OSError) as error:
        message, code = f"error: {error}", MISTAKE
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        message, code = ("terminated" if number == signal.SIGTERM else "interrupted") + interrupted, 128 + number
        if rank != "0":
            return code
    print(message if rank == "0" else f"process {rank}: {message}", file=sys.stderr, flush=True)
    return code


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, too, so that files are closed and temporary ones deleted; hold_signals delays it."""

    def end(number, frame):
        if _delayed is None:
            raise KeyboardInterrupt(number)
        _delayed.append(number)

    handlers = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def hold_signals() -> Iterator[None]:
    """Delay SIGTERM and Ctrl-C inside: for code that must not be left in the middle, such as while it holds a lock."""
    global _delayed
    _delayed = []
    try:
        yield
    finally:
        arrived, _delayed = _delayed, None
        if arrived:
            signal.raise_signal(arrived[0])
