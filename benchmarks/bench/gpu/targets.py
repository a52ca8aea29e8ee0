"""The figures that the CUDA kernels are to reach."""

from bench.targets import target

PLAIN = ("plain", "plain-channels-last")
CHECKPOINT = ("checkpoint", "checkpoint-channels-last")
COMPILED = ("compile-channels-last",)
FUSED = ("fused", "fused-channels-last")
GRAPH = ("fused-graph",)
IMAGENET, CIFAR, CIFAR_HALF = ("densenet121", "bfloat16", 256), ("cifar", "float32", 64), ("cifar", "bfloat16", 64)
RATIOS = (  # name, least, figure, group, implementations above and below the line
    ("DenseNet-121 bf16: times faster than plain", 2.0, "seconds", IMAGENET, PLAIN, FUSED),
    ("DenseNet-121 bf16: times faster than torch.compile", 1.3, "seconds", IMAGENET, COMPILED, FUSED),
    ("CIFAR batch 64 fp32: CUDA graph, times faster than plain", 3.0, "seconds", CIFAR, PLAIN, GRAPH),
    ("CIFAR batch 64 bf16: CUDA graph, times faster than plain", 3.0, "seconds", CIFAR_HALF, PLAIN, GRAPH),
    ("CIFAR fp32: plain peak over fused peak", 8.0, "peak_bytes", CIFAR, PLAIN, FUSED),
    ("CIFAR fp32: checkpoint peak over fused peak", 2.5, "peak_bytes", CIFAR, CHECKPOINT, FUSED),
)


def evaluate(rows, bandwidth=None, moved=None):
    """All targets. `rows` of steps.py; `moved`: bytes of DenseNet-121's step for the roofline, with a copy's bandwidth."""

    def least(figure, group, names):
        chosen = [r for r in rows if (r["net"], r["dtype"], r["batch_size"]) == group and r["implementation"] in names]
        return min((row[figure] for row in chosen if row.get(figure)), default=None)

    found = []
    for name, wanted, figure, group, *families in RATIOS:
        above, below = (least(figure, group, family) for family in families)
        found.append(target(name, above / below if above and below else None, least=wanted))
    fused = least("seconds", IMAGENET, FUSED)
    times = fused * bandwidth / moved if fused and bandwidth and moved else None
    found.insert(2, target("DenseNet-121 bf16: times the byte roofline", times, most=1.6))
    return found
