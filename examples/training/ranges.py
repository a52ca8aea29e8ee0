"""Numbers on the command line, with the range that each may have."""

import argparse
import math


class Number:
    """A `type` of argparse: an int or a float within bounds.

    Args:
        kind: int or float. Infinity and NaN are no numbers here.
        at_least, more_than, at_most, less_than: the bounds that hold; None: no such bound.
    """

    def __init__(self, kind: type, *, at_least=None, more_than=None, at_most=None, less_than=None):
        self.kind = kind
        bounds = {"at least": at_least, "more than": more_than, "at most": at_most, "less than": less_than}
        self.bounds = {words: bound for words, bound in bounds.items() if bound is not None}

    def __call__(self, text: str) -> int | float:
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        holds = {
            "at least": lambda bound: value >= bound,
            "more than": lambda bound: value > bound,
            "at most": lambda bound: value <= bound,
            "less than": lambda bound: value < bound,
        }
        if not math.isfinite(value) or not all(holds[words](bound) for words, bound in self.bounds.items()):
            raise argparse.ArgumentTypeError(f"{text!r} is not valid; it must be {self}")
        return value

    def __str__(self) -> str:
        bounds = " and ".join(f"{words} {bound}" for words, bound in self.bounds.items())
        return f"{'an integer' if self.kind is int else 'a number'}{', ' * bool(bounds)}{bounds}"


def depth(text: str) -> int:
    """A `type` of argparse: the depth of a network of three dense blocks."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 10 or (value - 4) % 6:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not valid; it must be 6n + 4 with n at least 1, such as 40 or 100"
        )
    return value
