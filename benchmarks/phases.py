"""The budget of one fused training step on a CPU: milliseconds by phase, measured inside a real step, beside their floors.

    python benchmarks/phases.py --workloads cifar --implementations fused,fused-kept

A step is profiled some times; bench/cpu/phases.py says what a phase and a floor are. Operations are counted as the fused
network does them, so that their sum is less than the plain network's. The profiler's own time is in the phases: the
unprofiled step stands below.
"""

from bench import environment, options, results, workloads
from bench.cpu import phases
from bench.implementations import EAGER
from tqdm import tqdm


def parse_arguments(arguments=None):
    parser = options.new_parser(__doc__)
    add = parser.add_argument
    fused = [name for name in EAGER if name.startswith("fused")]
    add("--workloads", type=options.names(workloads.TRAINING), default=("cifar",), help=",".join(workloads.TRAINING))
    add("--implementations", type=options.names(fused), default=("fused", "fused-kept"), help=",".join(fused))
    add("--batch-size", type=int)
    add("--rounds", type=int, default=7)
    environment.add_threads(parser)
    options.add_quick(parser)
    options.add_outputs(parser)
    return parser.parse_args(arguments)


def main():
    args = parse_arguments()
    measured = {"benchmark": "phases", "machine": environment.begin(args.threads), "steps": [], "rows": []}
    chosen = [(name, implementation) for name in args.workloads for implementation in args.implementations]
    for name, implementation in tqdm(chosen, desc="phases", disable=None):
        workload = workloads.find(name, args.dtype, args.batch_size, args.quick)
        rows, facts = phases.measure(workload, implementation, args.rounds, args.quick)
        measured["rows"] += rows
        measured["steps"].append(facts)
        print(phases.step_text(rows, facts) + "\n", flush=True)
    results.write(args, measured)


if __name__ == "__main__":
    main()
