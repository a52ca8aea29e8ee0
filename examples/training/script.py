"""How the scripts end: messages instead of tracebacks, and exit codes."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from training.errors import UserError

MISTAKE = 2  # exit code for what the user can mend; argparse has the same
_held: list[int] | None = None  # signals that arrived inside hold_signals; None outside


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


def run_script(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None, interrupted: str = "") -> int:
    """Calls main(argv) and returns the exit code of the script.

    Args:
        main: raises UserError for what the user can mend.
        interrupted: what is to be said after Ctrl-C or SIGTERM, which end the script with code 130 and 143.
    """
    try:
        with _termination():
            main(argv)
    except UserError as error:
        _tell(f"error: {error}")
        return MISTAKE
    except OSError as error:  # of libraries that write files themselves
        _tell(f"error: {error}")
        return MISTAKE
    except KeyboardInterrupt as error:
        by_signal = isinstance(error, Terminated)
        if os.environ.get("RANK", "0") == "0":
            _tell(f"{'terminated' if by_signal else 'interrupted'}{interrupted}")
        return 128 + (signal.SIGTERM if by_signal else signal.SIGINT)
    return 0


def _tell(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    print(message if rank == "0" else f"process {rank}: {message}", file=sys.stderr, flush=True)


@contextmanager
def _termination() -> Iterator[None]:
    """Inside, SIGTERM raises Terminated, so that files are closed and temporary ones deleted; hold_signals delays it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def end(number, frame):
        if _held is not None:
            _held.append(number)
        else:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def hold_signals() -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C wait, for code that must not be left in the middle, such as a lock's."""
    global _held
    if _held is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _held = []
    try:
        yield
    finally:
        held, _held = _held, None
        if held:
            signal.raise_signal(held[0])
