"""Command-line options that several benchmarks share."""

import argparse
from pathlib import Path

DTYPES = ("float64", "float32", "bfloat16", "float16")


def new_parser(description):
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def names(choices):
    """A type of argparse: names with commas between them, each of them one of `choices`."""

    def parse(text):
        chosen = words(text)
        if unknown := [name for name in chosen if name not in choices]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(choices)}")
        return chosen

    return parse


def words(text):
    """A type of argparse: anything with commas between its parts."""
    return tuple(text.split(","))


def numbers(text):
    """A type of argparse: whole numbers with commas between them."""
    return tuple(int(word) for word in text.split(","))


def size(text):
    """A type of argparse: a size such as 8x3x224x224, samples first, then channels."""
    numbers = text.split("x")
    if len(numbers) < 3 or not all(number.isdigit() and int(number) > 0 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text}: it must be a size such as 8x3x224x224")
    return tuple(map(int, numbers))


def add_quick(parser):
    """The options of the commands that measure eager steps or ops on a CPU."""
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="bfloat16: autocast")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing compiled: no figure means anything")


def add_outputs(parser, plot=None):
    """The files of a result, which report.py writes again from the first of them."""
    parser.add_argument("--json", metavar="FILE", type=Path, help="results, and their tables beside them as FILE.md")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="a line for each row")
    if plot:
        parser.add_argument("--plot", metavar="FILE", type=Path, help=plot)
