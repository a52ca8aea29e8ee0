"""Time of every kernel op on a CPU beside the composition of PyTorch's operators that it replaces, and its limit.

    python benchmarks/kernels.py                the layers of three networks, and odd sizes beside even ones

The composition (bench/compositions.py) is timed in both memory formats and the faster one counts. All ops of a size are timed
in turn, with a large matrix product and a copy between them: a limit is the longer of the op's bytes at the copy's rate
and its operations at the product's (bench/roofline.py). GB/s are of those bytes, so what fits the caches can exceed the
copy's. Tensors of all of them are in pages of 2 MB where the system has such, as the library's workspaces are, and a call
that is timed follows one that is not: in a step, too, threads are awake. An op that comes out below half of its limit has its
reason below the table.
"""

import time

from bench import environment, options, results
from bench.cpu import kernels
from bench.kernel_cases import NETS, cpu_cases
from bench.roofline import FORMULAS


def parse_arguments(arguments=None):
    parser = options.new_parser(__doc__)
    add = parser.add_argument
    add("--ops", type=options.names(FORMULAS), default=tuple(FORMULAS), help="some of " + ",".join(FORMULAS))
    add("--nets", type=options.names(NETS), default=NETS, help=",".join(NETS))
    add("--rounds", type=int, default=9)
    add("--time-limit", type=float, default=900, help="seconds after which no size is begun")
    environment.add_threads(parser)
    options.add_quick(parser)
    options.add_outputs(parser)
    return parser.parse_args(arguments)


def main():
    args = parse_arguments()
    environment.restart_with(environment.HUGE_PAGES)
    description = environment.begin(args.threads)
    cases = [case for case in cpu_cases(args.quick) if case.net in args.nets]
    deadline = time.monotonic() + args.time_limit
    rows = kernels.measure(cases, args.ops, args.dtype, args.rounds, deadline, args.quick)
    odd = kernels.odd_ratios(rows)
    measured = {"benchmark": "kernels", "machine": description, "odd": odd, "rows": rows}
    results.publish(args, measured)


if __name__ == "__main__":
    main()
