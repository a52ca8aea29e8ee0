"""What the CUDA kernels are to reach, and whether the measured figures do."""

from dataclasses import asdict, dataclass

from roofline import STORAGE_BYTES, step_bytes

PLAIN = ("plain", "plain-channels-last")
CHECKPOINT = ("checkpoint", "checkpoint-channels-last")
FUSED = ("fused", "fused-channels-last")


@dataclass(frozen=True)
class Target:
    name: str
    wanted: str
    found: float | None = None  # None: not measured
    reached: bool | None = None

    @classmethod
    def at_least(cls, name, limit, found):
        return cls(name, f">= {limit:g}", found, None if found is None else found >= limit)

    @classmethod
    def at_most(cls, name, limit, found):
        return cls(name, f"<= {limit:g}", found, None if found is None else found <= limit)

    @property
    def verdict(self):
        return {True: "reached", False: "missed", None: "not measured"}[self.reached]


def evaluate(rows, bandwidth=None, architectures=None):
    """All targets. `rows` of gpu_steps; `architectures` {net: Architecture} for the roofline, with a copy's bandwidth."""

    def least(figure, net, dtype, batch, names):
        return _least(rows, figure, net, dtype, batch, names)

    def ratio(figure, net, dtype, batch, of, to):
        above, below = least(figure, net, dtype, batch, of), least(figure, net, dtype, batch, to)
        return above / below if above and below else None

    imagenet = ("densenet121", "bfloat16", 256)
    targets = [
        Target.at_least("DenseNet-121 bf16: times faster than plain", 2.0, ratio("seconds", *imagenet, PLAIN, FUSED)),
        Target.at_least(
            "DenseNet-121 bf16: times faster than torch.compile", 1.3, ratio("seconds", *imagenet, ("compile",), FUSED)
        ),
    ]
    fused, floor = least("seconds", *imagenet, FUSED), None
    if bandwidth and architectures and "densenet121" in architectures:
        floor = step_bytes(architectures["densenet121"], 256, STORAGE_BYTES["bfloat16"]) / bandwidth
    found = fused / floor if fused and floor else None
    targets.append(Target.at_most("DenseNet-121 bf16: times the byte roofline", 1.6, found))
    for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16")):
        found = ratio("seconds", "cifar", dtype, 64, PLAIN, ("fused-graph",))
        targets.append(Target.at_least(f"CIFAR batch 64 {short}: CUDA graph, times faster than plain", 3.0, found))
    small = ("cifar", "float32", 64)
    targets += [
        Target.at_least("CIFAR fp32: plain peak over fused peak", 8.0, ratio("peak_bytes", *small, PLAIN, FUSED)),
        Target.at_least(
            "CIFAR fp32: checkpoint peak over fused peak", 2.5, ratio("peak_bytes", *small, CHECKPOINT, FUSED)
        ),
    ]
    return targets


def as_rows(targets):
    return [asdict(t) | {"verdict": t.verdict} for t in targets]


def _least(rows, figure, net, dtype, batch, names):
    found = [
        row[figure]
        for row in rows
        if (row["net"], row["dtype"], row["batch_size"]) == (net, dtype, batch)
        and row["implementation"] in names
        and row.get(figure)
    ]
    return min(found, default=None)
