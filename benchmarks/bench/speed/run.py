"""The measurements of one process of speed.py: all workloads under one allocator, into a journal.

For each workload come the plain network's numbers; every implementation's, from the same weights, data and masks, beside
them; its memory; at last all implementations that were right, in turn, with the machine's rates between them. An
implementation that fails is a row that says how.
"""

import gc
import time
from dataclasses import replace
from statistics import median

import torch

from bench import agreement, environment, roofline, workloads
from bench.implementations import IMPLEMENTATIONS
from bench.machine_rates import RateSamples
from bench.memory_meter import measure_memory
from bench.networks import build_model
from bench.runner.journal import Journal
from bench.steps import new_step
from bench.tables import first_line
from bench.timing import interleave, quantile_row

PREPARING = 0.6  # of a workload's time: no implementation is begun later
COMPILING, RUNNING = 1500, 300  # seconds that a cell may take before its process is taken for hanging
COMPARED = ("outputs", "gradients")
PARTS = ("forward_seconds", "backward_seconds", "optimizer_seconds")
RECOMPUTING = ("checkpoint", "selective", "torchvision-efficient", "compile-budget", "fused-kept")


def left_out(name, workload):
    """The reason why an implementation has no place in a workload, or None."""
    if name == "saved-on-cpu":
        return "moves saved tensors from a GPU to the CPU, and here they are there"
    if not workload.training and name.startswith(RECOMPUTING):
        return "differs in what is kept for backward, and inference has none"
    if workload.training and IMPLEMENTATIONS[name].freeze:
        return "makes weights constant, for inference only"
    if name.startswith("torchvision") and workload.spec.variant:
        return "has neither Drop-Channel nor squeeze-and-excitation"
    if workload.training and "A" in workload.spec.variant and name.startswith("compile-budget"):
        return "recomputes masks wrongly (pytorch#190758): the others are what is left to compare with"
    return None


def work(args):
    """Measure under the allocator that this process was started with."""
    torch.set_num_threads(args.threads[0])
    journal = Journal(args.folder / f"{args.worker}.jsonl")
    description = environment.describe("cpu")
    del description["command"]  # that of a worker, in whatever folder
    journal.fact("machine", description)
    settings = {"dtype": args.dtype, "rounds": args.rounds, "batch_size": args.batch_size, "tiny": args.quick}
    measure(journal, args.workloads, args.implementations, time.monotonic() + args.seconds, **settings)


def choose_implementations(names, workload, dtype):
    """The names that have a place in `workload`, and the reasons why others have none."""
    chosen = [*names, *(["fused-float32"] if dtype != "float32" and "fused" in names else [])]
    # time usually runs out for compilers
    chosen.sort(key=lambda name: (IMPLEMENTATIONS[name].runner == "compile", not name.startswith(("fused", "plain"))))
    reasons = {name: left_out(name, workload) for name in chosen}
    return [name for name in chosen if not reasons[name]], {n: r for n, r in reasons.items() if r}


def measure(journal, names, implementations, deadline, *, dtype="float32", rounds=5, batch_size=None, tiny=False):
    """Measure all workloads, each with an equal share of the time that is left."""
    chosen = [workloads.find(name, dtype, batch_size, tiny) for name in names]
    journal.fact("cells", sum(2 + len(choose_implementations(implementations, w, dtype)[0]) for w in chosen))
    for i, workload in enumerate(chosen):
        end = time.monotonic() + max(0.0, deadline - time.monotonic()) / (len(chosen) - i)
        WorkloadRun(journal, workload, implementations, end, rounds, tiny).run()
        torch.compiler.reset()
        gc.collect()


class WorkloadRun:
    def __init__(self, journal, workload, implementations, end, rounds, tiny=False):
        self.journal, self.workload, self.rounds, self.tiny = journal, workload, rounds, tiny
        self.begun, self.end = time.monotonic(), end
        self.chosen, self.left_out = choose_implementations(implementations, workload, workload.spec.dtype)

    def row(self, which, **values):
        self.journal.row(f"{self.workload.name} {which}", **values)

    def run(self):
        name = self.workload.name
        if f"{name} timing" in self.journal.begun:  # by a process that died here or later
            return
        self.journal.begin(f"{name} reference", allow=RUNNING)
        self.journal.fact(f"left out {name}", self.left_out)
        state = build_model(self.workload.spec_of("plain")).state_dict()
        dtypes = {self.workload.spec_of(implementation).dtype for implementation in self.chosen}
        expected = {dtype: self.plain(dtype, state) for dtype in dtypes}
        exact = self.examine()
        self.row("reference")
        ready = {i: step for i in self.chosen if (step := self.prepare(i, state, expected, exact.get(i, {})))}
        if ready and self.journal.begin(f"{name} timing", allow=10 * RUNNING):
            self.time(ready)
            self.row("timing")

    def plain(self, dtype, state):
        """The numbers of the plain network's step, to compare those of others with."""
        return new_step(replace(self.workload, spec=replace(self.workload.spec, dtype=dtype)), "plain", state).first

    def examine(self):
        """The errors of eager implementations in float64, by name, on two images, to the last digits.

        {"error": why} is that of one which is wrong, or fails: whatever it raises is its result.
        """
        found, expected = {}, None
        for name in self.chosen if self.workload.training else ():
            traits = IMPLEMENTATIONS[name]
            if traits.runner != "eager" or traits.dtype is not None or name == "plain":
                continue
            specs = [replace(self.workload.spec_of(i), dtype="float64") for i in ("plain", name)]
            expected = expected or agreement.train_once(specs[0])
            try:
                numbers = agreement.train_once(specs[1], expected["state"])
                found[name] = agreement.compare(specs[1], numbers, expected, COMPARED)
            except Exception as error:
                found[name] = {"error": failure_text(error)}
        return found

    def prepare(self, name, state, expected, exact):
        """A step, warm, its numbers compared and its memory measured; None where there is nothing to be timed."""
        key, spec = f"{self.workload.name} {name}", self.workload.spec_of(name)
        compiled = spec.traits.runner == "compile"
        if self.journal.previous.rows.get(key, {}).get("error"):
            return None
        layout = "channels last" if spec.memory_format == torch.channels_last else "contiguous"
        cell = {"workload": self.workload.name, "title": self.workload.title, "training": self.workload.training}
        cell |= {"implementation": name, "variant": spec.variant or "BC", "dtype": spec.dtype}
        cell |= {"batch_size": spec.batch_size, "size": spec.size, "layout": layout}
        late = time.monotonic() > self.begun + PREPARING * (self.end - self.begun)
        wrong = exact.get("error") or ("out of time" if late else None)
        self.journal.begin(key, allow=COMPILING if compiled else RUNNING, **cell)
        if wrong:
            return self.row(name, **cell, error=wrong)
        try:
            step = new_step(self.workload, name, state)
            errors = agreement.compare(step.spec, step.first, expected[step.spec.dtype], COMPARED)
            step.first = step.state = None
            memory = measure_memory(step)
            quick = step.timed()
        except Exception as error:  # an implementation that fails is a result, and compilers raise anything
            return self.row(name, **cell, error=failure_text(error))
        found = {
            "errors": errors,
            "float64_errors": exact,
            "warm_up_seconds": step.warm_up_seconds,
            "compiled": compiled,
        }
        figures = {"seconds": sum(quick), "rounds": 0, "peak_bytes": memory.peak_bytes, "kept_bytes": memory.kept_bytes}
        self.row(name, **cell, **found, **figures, workspace_bytes=memory.workspace_bytes)
        return step

    def time(self, ready):
        """Time all that is ready, and hold it against operations and bytes of the step at the machine's rates."""
        machine, training = RateSamples(self.workload.spec.dtype, self.tiny), self.workload.training
        samples = {name: step.timed for name, step in ready.items()} | machine.samples
        times = interleave(samples, self.rounds, self.end)
        rates = machine.rates(times)
        self.journal.fact(f"rates {self.workload.name}", rates)
        for name, step in ready.items():
            row = quantile_row([sum(parts) for parts in times[name]]) | {"rounds": len(times[name])}
            row |= zip(PARTS, map(median, zip(*times[name], strict=True)), strict=False)  # inference has one part
            row |= {"flops": roofline.step_flops(step.spec, training)}
            row |= {"bytes": roofline.step_bytes(step.spec, training=training)}
            row |= {"of_arithmetic": row["seconds"] * rates["flops"] / row["flops"]}
            self.row(name, **row, of_bytes=row["seconds"] * rates["bytes"] / row["bytes"])


def failure_text(error):
    return f"wrong: {error}" if isinstance(error, agreement.DisagreementError) else first_line(error)
