"""The figures that the CUDA kernels are to reach."""

from bench.targets import Target

PLAIN = ("plain", "plain-channels-last")
CHECKPOINT = ("checkpoint", "checkpoint-channels-last")
COMPILED = ("compile-channels-last",)
FUSED = ("fused", "fused-channels-last")


def evaluate(rows, bandwidth=None, moved=None):
    """All targets. `rows` of steps.py; `moved`: bytes of DenseNet-121's step for the roofline, with a copy's bandwidth."""

    def least(figure, cell, names):
        chosen = [r for r in rows if (r["net"], r["dtype"], r["batch_size"]) == cell and r["implementation"] in names]
        return min((row[figure] for row in chosen if row.get(figure)), default=None)

    def ratio(figure, cell, of, to):
        above, below = least(figure, cell, of), least(figure, cell, to)
        return above / below if above and below else None

    imagenet, small = ("densenet121", "bfloat16", 256), ("cifar", "float32", 64)
    fused, floor = least("seconds", imagenet, FUSED), moved / bandwidth if moved and bandwidth else None
    faster, compiled = (ratio("seconds", imagenet, names, FUSED) for names in (PLAIN, COMPILED))
    captured = {t: ratio("seconds", ("cifar", t, 64), PLAIN, ("fused-graph",)) for t in ("float32", "bfloat16")}
    less, less_than_checkpoint = (ratio("peak_bytes", small, names, FUSED) for names in (PLAIN, CHECKPOINT))
    return [
        Target.at_least("DenseNet-121 bf16: times faster than plain", 2.0, faster),
        Target.at_least("DenseNet-121 bf16: times faster than torch.compile", 1.3, compiled),
        Target.at_most("DenseNet-121 bf16: times the byte roofline", 1.6, fused / floor if fused and floor else None),
        Target.at_least("CIFAR batch 64 fp32: CUDA graph, times faster than plain", 3.0, captured["float32"]),
        Target.at_least("CIFAR batch 64 bf16: CUDA graph, times faster than plain", 3.0, captured["bfloat16"]),
        Target.at_least("CIFAR fp32: plain peak over fused peak", 8.0, less),
        Target.at_least("CIFAR fp32: checkpoint peak over fused peak", 2.5, less_than_checkpoint),
    ]
