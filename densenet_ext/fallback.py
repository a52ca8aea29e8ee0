"""The policy for modules and inputs that the fused implementation cannot serve: warn, raise, or say nothing.

_reasons.py finds what cannot be served. Unless an error is raised, the modules are called and give the same numbers.
"""

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ._transforms import is_recording

MODES = ("warn", "error", "silent")


class NotFused(Exception):
    """Something is not fused in a context of `strict`; the message is the reason."""


_disabled = os.environ.get("DENSENET_EXT_DISABLE", "0") not in ("", "0")
_mode = "warn"
_reported: set[str] = set()  # messages of warnings, which are not repeated


class _Thread(threading.local):
    """Switches that the contexts below set for one thread; each thread runs __init__ for itself."""

    def __init__(self):
        self.reported = self.strict = False


_thread = _Thread()


class set_fallback:
    """Choose what happens where efficient='fused' cannot serve a module or an input.

    A call takes effect at once and lasts; as a context manager, it lasts until the end of the `with` block:

        densenet_ext.set_fallback("error")
        with densenet_ext.set_fallback("silent"):
            model(images)

    The mode holds for all threads of the process, because DataParallel runs a network in several: a `with` block in one
    thread also changes what the others do meanwhile. With the environment variable DENSENET_EXT_DISABLE=1, which is
    read when the package is imported, nothing is fused, and 'error' does what 'warn' does. Nothing is said while
    torch.export, torch.onnx.export or torch.jit.trace records a model: a file has plain operators in any case.

    Args:
        mode: 'warn' (the default): call the modules, which give the same numbers, and warn once for each reason.
            'error': raise RuntimeError with the reason. 'silent': call the modules and say nothing.

    Raises:
        ValueError: mode is none of these; nothing was changed.
    """

    def __init__(self, mode: str) -> None:
        global _mode, _reported
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; it may be 'warn', 'error' or 'silent'")
        self._previous = (_mode, _reported)
        _mode, _reported = mode, set()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        global _mode, _reported
        _mode, _reported = self._previous


def is_disabled() -> bool:
    """Return True if the environment variable DENSENET_EXT_DISABLE switches the fused implementation off."""
    return _disabled


def report(reason: str) -> None:
    """Tell the user, as set_fallback says, that modules are called for this reason.

    A recording of the model (torch.export, torch.jit.trace) asks for the modules, so nothing is said of it.

    Raises:
        RuntimeError: the mode is 'error'.
        NotFused: the call is in a context of `strict`.
    """
    if _thread.strict:
        raise NotFused(reason)
    if _thread.reported or is_recording():
        return
    if _mode == "error" and not _disabled:
        raise RuntimeError(f"efficient='fused' cannot be used: {reason}")
    if _mode != "silent":
        warn_once(f"using the plain implementation instead of efficient='fused': {reason}")


@torch.compiler.assume_constant_result  # torch.compile warns while it traces: a warning in the graph would break it
def warn_once(message: str) -> None:
    """Warn, but about each message only once after a call of set_fallback."""
    if message not in _reported:
        _reported.add(message)
        warnings.warn(message, stacklevel=4)


@contextmanager
def already_reported() -> Iterator[None]:
    """Make `report` do nothing on this thread: a block has said why it falls back, so its layers need not."""
    if is_recording():  # nothing is reported, and torch.export warns of everything that a call changes
        yield
        return
    outer = _thread.reported
    _thread.reported = True
    try:
        yield
    finally:
        _thread.reported = outer


@contextmanager
def strict() -> Iterator[None]:
    """Make `report` raise NotFused on this thread, whatever the mode: a comparison has to see the fused ops."""
    outer = _thread.strict
    _thread.strict = True
    try:
        yield
    finally:
        _thread.strict = outer
