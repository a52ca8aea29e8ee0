"""`python -m densenet_ext` lists the package's commands and runs one of them."""

import argparse
import sys

from densenet_ext import info


def _size(text: str) -> tuple[int, ...]:
    """Return the numbers of a size such as 8x3x224x224."""
    numbers = text.split("x")
    if len(numbers) < 3 or not all(number.isdigit() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text}: it must be a size such as 8x3x224x224")
    return tuple(map(int, numbers))


def main(arguments: list[str] | None = None) -> int:
    """Run the command that `arguments` name, by default the command line's, and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m densenet_ext", description="densenet_ext trains DenseNets in a fraction of the memory."
    )
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    options = commands.add_parser("demo", help="measure a training step with each implementation: half a minute")
    options.add_argument("--depth", type=int, default=100, help="of the network, 6 * n + 4 (default: %(default)s)")
    options.add_argument("--batch-size", type=int, default=16, help="images of 32x32 (default: %(default)s)")
    options.add_argument("--device", help="cpu or cuda (default: cuda if it can be used)")
    commands.add_parser("info", help="print which versions are installed and which kernels run here, for a bug report")
    options = commands.add_parser("plan", help="predict the memory of a training step, and choose what it keeps")
    options.add_argument("network", help="densenet121, densenet_bc_100_12 or another function that builds a network")
    options.add_argument("--input", required=True, type=_size, help="such as 256x3x224x224, samples first")
    options.add_argument("--dtype", default="float32", help="float32, bfloat16, float16 or float64")
    options.add_argument("--budget", help="such as 4GB; smallest or fastest; default: keep what costs no memory")
    chosen = parser.parse_args(arguments)
    if chosen.command == "demo":
        from densenet_ext import demo  # needs torch and the compiled library, as `info` does not

        return demo.main(chosen.depth, chosen.batch_size, chosen.device)
    if chosen.command == "plan":
        from densenet_ext import planning

        return planning.main(chosen.network, chosen.input, chosen.dtype, chosen.budget)
    if chosen.command == "info":
        return info.main()
    parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
