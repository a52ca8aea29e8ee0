"""The largest batch, and the deepest network, that one training step can have within a budget of memory.

    python benchmarks/largest_batch.py --budget-mb 2000

Counted are parameters, gradients, momentum, and the step's peak over them. On a CPU that is measured
(bench/memory_meter.py) at sizes that a line through earlier measurements predicts, until one fits and the next larger one
does not; workspaces, which come in pages of 2 MB, make it a line with steps. On a GPU the budget is the allocator's, by
default the whole device, and what does not fit is a real lack of memory.
"""

import time

from bench import environment, largest, options, results
from bench.implementations import EAGER
from bench.networks import VARIANTS

DEFAULT = ("plain", "torchvision-efficient", "checkpoint", "selective", "fused", "fused-kept")
SETTINGS = ("variant", "depth", "batch_size", "growth_rate", "size", "dtype", "device")


def parse_arguments(arguments=None):
    parser = options.new_parser(__doc__)
    add = parser.add_argument
    add("--budget-mb", type=float, help="default 2000 on a CPU, the whole device on a GPU")
    environment.add_device(parser)
    add("--implementations", type=options.names(EAGER), default=DEFAULT, help="default: " + ",".join(DEFAULT))
    add("--variant", default="BC", choices=("BC", *VARIANTS), help="default BC: without dropout")
    add("--search", type=options.names(largest.MOST), default=tuple(largest.MOST), help="batch,depth")
    add("--depth", type=int, default=100, help="of the network whose batch grows")
    add("--batch-size", type=int, default=16, help="of the network whose depth grows")
    add("--growth-rate", type=int, default=12)
    add("--size", type=int, default=32, help="height and width of the images")
    add("--dtype", default="float32", choices=options.DTYPES)
    environment.add_threads(parser)
    add("--time-limit", type=float, default=1200, help="seconds after which no row is begun")
    options.add_outputs(parser)
    return parser.parse_args(arguments)


def main():
    args = parse_arguments()
    description = environment.begin(args.threads, args.device)
    settings = {name: getattr(args, name) for name in SETTINGS}
    budget = largest.choose_budget(args.device, args.budget_mb)
    deadline = time.monotonic() + args.time_limit
    rows = largest.measure(settings, args.search, args.implementations, budget, deadline)
    measured = {"benchmark": "largest_batch", "machine": description, "settings": settings, "rows": rows}
    results.publish(args, measured)


if __name__ == "__main__":
    main()
