"""Draws from a seed a random network, its inputs, and how it is used for two steps."""

import random
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from densenet_ext import DenseNetBC, DropChannel, EfficientDenseBlock, EfficientDenseLayer
from fuzz.libraries import LIBRARIES, SIZES

# Half of all networks use float64, where errors can be told from roundings. With "autocast" parameters are float32.
PRECISIONS = {
    "float64": 10,
    "float32": 3,
    "bfloat16": 2,
    "float16": 1,
    "autocast bfloat16": 2,
    "autocast float16": 1,
}
EFFICIENT = ("checkpoint", "fused")
MODES = ("train", "eval", "mixed")
# A forward pass has at most this many multiplications: about a fifth of a second of plain PyTorch in float64.
MOST_WORK = 1e8

# Inputs [n, c, h, w] are views of contiguous tensors. Each layout is the shape of that tensor and the view.
LAYOUTS = {
    "contiguous": (lambda n, c, h, w: (n, c, h, w), lambda t, n, c, h, w: t),
    "channels last": (lambda n, c, h, w: (n, h, w, c), lambda t, n, c, h, w: t.permute(0, 3, 1, 2)),
    "narrow": (lambda n, c, h, w: (n + 1, c + 2, h + 3, w + 1), lambda t, n, c, h, w: t[1:, 1 : 1 + c, 2 : 2 + h, :w]),
    "narrow channels last": (
        lambda n, c, h, w: (n, h, w, c + 3),
        lambda t, n, c, h, w: t[..., 2 : 2 + c].permute(0, 3, 1, 2),
    ),
    "strided": (lambda n, c, h, w: (n, c, 2 * h, 3 * w), lambda t, n, c, h, w: t[:, :, ::2, 1::3]),
    "transposed": (lambda n, c, h, w: (n, c, w, h), lambda t, n, c, h, w: t.transpose(2, 3)),
    "samples innermost": (lambda n, c, h, w: (c, h, w, n), lambda t, n, c, h, w: t.permute(3, 0, 1, 2)),
    "expanded channels": (lambda n, c, h, w: (n, 1, h, w), lambda t, n, c, h, w: t.expand(n, c, h, w)),
    "expanded samples": (lambda n, c, h, w: (1, c, h, w), lambda t, n, c, h, w: t.expand(n, c, h, w)),
}


@dataclass(frozen=True)
class Network:
    """A model, a lone block or a lone layer with `options`, and everything else that a run of it depends on.

    library: that of the model, which is converted in place of being built fused; '' for this package's.

    inputs: (channels, layout) of each input; only a layer has several, and may get the first one twice. modes: one for
    each step. norms: which norms have zeros in their weights or no weights; running: which have no running statistics;
    frozen: which parameters have no gradient; for 'some' and 'mixed' `choices` decides. poisoned: new memory is full of
    NaN.
    """

    seed: int
    kind: str
    library: str
    precision: str
    options: dict
    samples: int
    size: tuple[int, int]
    inputs: tuple[tuple[int, str], ...]
    first_twice: bool
    modes: tuple[str, str]
    norms: str
    running: str
    frozen: str
    gradients: str
    upstream: str
    model_layout: str
    keep_bottleneck: bool | int | str
    poisoned: bool
    threads: int
    choices: int

    def __str__(self):
        return "\n".join(f"    {field.name}: {getattr(self, field.name)}" for field in fields(self))

    @property
    def implementations(self) -> tuple[str, ...]:
        """The values of `efficient` that are compared with plain; 'fused' converts another library's model."""
        return ("fused",) if self.library else EFFICIENT

    @property
    def half(self) -> torch.dtype | None:
        """The dtype of autocast; None without autocast."""
        return getattr(torch, self.precision.split()[1]) if "autocast" in self.precision else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return torch.float32 if self.half else getattr(torch, self.precision)

    def values_seed(self, of: str, draw: int, step: int = 0) -> int:
        """The seed of torch's generator for one kind of random values; each kind has another seed."""
        return 1000 * self.seed + 100 * ("weights", "inputs", "upstream", "masks").index(of) + 2 * draw + step

    def build(self, draw: int = 0) -> nn.Module:
        """Build the network in float64, with random values that differ from draw to draw."""
        torch.manual_seed(self.values_seed("weights", draw))
        if self.library:
            module = LIBRARIES[self.library](**{key: self.options[key] for key in SIZES}).double()
        else:
            kind = {"model": DenseNetBC, "block": EfficientDenseBlock, "layer": EfficientDenseLayer}[self.kind]
            module = kind(**self.options).double()
        choose = random.Random(self.choices)
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                self._prepare_norm(norm, choose)
        for parameter in module.parameters():
            some = choose.random() < 0.4
            parameter.requires_grad_(not {"all": True, "none": False, "some": some}[self.frozen])
        if self.model_layout == "channels last":
            module.to(memory_format=torch.channels_last)
        return module

    def _prepare_norm(self, norm: nn.BatchNorm2d, choose: random.Random) -> None:
        """Make a norm neither the identity nor symmetric, with statistics as if it had seen batches before."""
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.5)
        norm.weight.data *= torch.where(torch.rand(norm.num_features) < 0.2, -1, 1)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.3, 2)
        norm.num_batches_tracked.fill_(choose.randrange(3))
        if self.running == "none" or (self.running == "some" and choose.random() < 0.4):
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        if self.norms == "zeros":
            norm.weight.data *= torch.rand(norm.num_features) < 0.7
        if self.norms == "not affine" or (self.norms == "some not affine" and choose.random() < 0.4):
            norm.affine, norm.weight, norm.bias = False, None, None

    def set_mode(self, module: nn.Module, step: int) -> None:
        """Set the mode of a step. In 'mixed' some norms, masks, layers and blocks are in another mode than the rest."""
        mode, choose = self.modes[step], random.Random(self.choices + 1 + step)
        module.train(mode == "train" or (mode == "mixed" and choose.random() < 0.7))
        if mode != "mixed":
            return
        alike = self.options["drop_rate"] > 0  # one op serves only layers with the same active drop_rate
        for part in module.modules():
            group = isinstance(part, EfficientDenseBlock) or (isinstance(part, EfficientDenseLayer) and not alike)
            single = isinstance(part, nn.BatchNorm2d | DropChannel)
            if (group and choose.random() < 0.15) or (single and choose.random() < 0.4):
                part.train(not part.training)

    def leaves(self, step: int, draw: int = 0) -> list[Tensor]:
        """The float64 tensors whose views are the inputs of a step."""
        generator = torch.Generator().manual_seed(self.values_seed("inputs", draw, step))
        shapes = [LAYOUTS[layout][0](self.samples, channels, *self.size) for channels, layout in self.inputs]
        scales = 10 ** (2 * torch.rand(len(shapes), generator=generator) - 1)
        offsets = torch.randn(len(shapes), generator=generator)
        return [
            scale * (torch.randn(shape, generator=generator, dtype=torch.float64) + offset)
            for shape, scale, offset in zip(shapes, scales.tolist(), offsets.tolist(), strict=True)
        ]

    def views(self, leaves: list[Tensor]) -> Tensor | list[Tensor]:
        """The inputs as the network takes them: one tensor, or a layer's list."""
        views = [
            LAYOUTS[layout][1](leaf, self.samples, channels, *self.size)
            for leaf, (channels, layout) in zip(leaves, self.inputs, strict=True)
        ]
        views += views[:1] * self.first_twice
        return views if len(views) > 1 else views[0]

    def upstream_gradient(self, output: Tensor, step: int, draw: int = 0) -> Tensor:
        """The gradient of the output, in the form of self.upstream; 'expanded' is the gradient of a sum."""
        if self.upstream == "expanded":
            return output.new_ones(()).expand(output.shape)
        generator = torch.Generator().manual_seed(self.values_seed("upstream", draw, step))
        grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
        if self.upstream == "channels last" and grad.dim() == 4:
            return grad.contiguous(memory_format=torch.channels_last)
        return grad


def draw_network(seed: int) -> Network:
    """Draw the network of a seed: the first of a series of random ones that is not too much work.

    A few have maps that become too small, or norms of a single value a channel: these end in errors.
    """
    rng = random.Random(seed)
    while True:
        network = _of_a_library(_candidate(seed, rng))
        work, values, pixels = _work(network)
        if work <= MOST_WORK and ((values != 1 and pixels > 0) or rng.random() < 0.1):
            return network


def _candidate(seed: int, rng: random.Random) -> Network:
    kind = rng.choices(("model", "block", "layer"), (7, 2, 1))[0]
    size = _draw_size(rng)
    options = _draw_options(rng)
    channels = options["in_channels"]
    twice = kind == "layer" and rng.random() < 0.1
    if kind == "model":
        options |= _draw_model_options(rng, options.pop("in_channels"), options["growth_rate"])
        channels = options["in_channels"]
        if not options["small_inputs"]:
            size = tuple(min(side * rng.randint(1, 4), 64) for side in size)
    elif kind == "block":
        options["num_layers"] = rng.randint(1, 6)
    parts = _split(rng, channels) if kind == "layer" else [channels]
    if twice:
        options["in_channels"] += parts[0]
    return Network(
        seed=seed,
        kind=kind,
        library="",
        precision=rng.choices(list(PRECISIONS), list(PRECISIONS.values()))[0],
        options=options,
        samples=rng.choices((0, 1, rng.randint(2, 5), rng.randint(6, 16)), (1, 4, 12, 1))[0],
        size=size,
        inputs=tuple((part, rng.choice(("contiguous", *LAYOUTS))) for part in parts),
        first_twice=twice,
        modes=tuple(rng.choices(MODES, (5, 1, 4), k=2)),
        norms=rng.choices(("affine", "zeros", "some not affine", "not affine"), (16, 1, 2, 1))[0],
        running=rng.choices(("all", "some", "none"), (16, 2, 1))[0],
        frozen=rng.choices(("none", "some", "all"), (12, 5, 1))[0],
        gradients=rng.choices(("inputs too", "parameters only", "no grad"), (12, 5, 1))[0],
        upstream=rng.choice(("contiguous", "contiguous", "channels last", "expanded")),
        model_layout=rng.choice(("contiguous", "contiguous", "channels last")),
        keep_bottleneck=_kept(rng.random()),
        poisoned=rng.random() < 0.3,
        threads=rng.choices((1, 2, 3, 4), (14, 3, 1, 2))[0],
        choices=rng.getrandbits(32),
    )


def _kept(choice: float) -> bool | int | str:
    """Return which bottlenecks are kept for backward, for a random number below 1."""
    if choice < 0.3:
        return choice < 0.15 or 1 + int(100 * choice) % 4
    return "auto" if choice < 0.6 else False


def _of_a_library(network: Network) -> Network:
    """Return the network, or in its place one of another library with its sizes."""
    rng = random.Random(network.seed + 1_000_000)
    if network.kind != "model" or rng.random() < 0.6:
        return network
    options = network.options | {"num_init_features": None, "small_inputs": False, "compression": 0.5}
    options |= {"growth_rate": max(2, network.options["growth_rate"]), "drop_rate": 0.0}
    # The library's dropout draws in the order of its maps in memory, which is the fused one's where nothing is permuted.
    planar = network.inputs[0][1] == "contiguous" and network.model_layout == "contiguous"
    if planar and network.precision == "float64":
        options["drop_rate"] = network.options["drop_rate"]
    size = tuple(max(16, side) for side in network.size)
    return replace(network, library=rng.choice([*LIBRARIES]), options=options, size=size)


def _sometimes(rng: random.Random, usual, other):
    return other if rng.random() < 0.4 else usual


def _draw_options(rng: random.Random) -> dict:
    """Draw the options that layers, blocks and models have."""
    growth = rng.randint(1, rng.choice((4, 12, 40, 40)))
    return {
        "in_channels": rng.randint(1, rng.choice((4, 16, 64, 200))),
        "growth_rate": growth,
        "bn_size": rng.choice((1, 1, 2, 2, 3, 4, 4, 5)),
        "drop_rate": _sometimes(rng, 0.0, rng.uniform(0.05, 0.6)),
        "drop_channel": _sometimes(rng, 0.0, rng.uniform(0.05, 0.6)),
        "drop_channel_position": rng.choice(("pre_norm", "pre_conv")),
        "se_reduction": _sometimes(rng, None, rng.randint(1, growth + 2)),
        "eps": rng.choice((1e-5, 1e-3, 10 ** rng.uniform(-8, 0))),
        "momentum": rng.choice((0.1, 0.1, None, 0.0, 1.0, rng.random())),
    }


def _draw_model_options(rng: random.Random, channels: int, growth: int) -> dict:
    """Draw the options that only models have; the stem has `channels` outputs, or its default number."""
    compression = rng.choice((0.5, 1.0, rng.uniform(0.1, 1)))
    return {
        "block_config": tuple(rng.randint(1, 6) for _ in range(rng.randint(1, 4))),
        "in_channels": rng.randint(1, 4),
        "num_init_features": rng.choice((None, channels, channels)),
        "num_classes": rng.randint(1, 5),
        "compression": max(compression, 1 / growth),  # a transition has at least one output
        "small_inputs": rng.random() < 0.6,
    }


def _draw_size(rng: random.Random) -> tuple[int, int]:
    """Draw height and width: one row or column, odd sizes, any sizes, or powers of two as in most networks."""
    how = rng.choices(("thin", "odd", "any", "power", "one pixel"), (6, 8, 12, 8, 1))[0]
    if how == "thin":
        return tuple(rng.sample((rng.choice((1, 1, 2)), rng.randint(1, 40)), 2))
    if how == "odd":
        return tuple(2 * rng.randint(1, 9) + 1 for _ in range(2))
    if how == "any":
        return tuple(rng.randint(2, rng.choice((8, 16, 40))) for _ in range(2))
    return (rng.choice((2, 4, 8, 16, 32)) if how == "power" else 1,) * 2


def _split(rng: random.Random, channels: int) -> list[int]:
    """Split the channels over a layer's inputs."""
    parts = []
    while channels:
        parts.append(rng.randint(1, channels))
        channels -= parts[-1]
    return parts


def _work(network: Network) -> tuple[float, int, int]:
    """The multiplications of a forward pass, and the values and the pixels of a channel in the last block."""
    options, (height, width) = network.options, network.size
    growth, channels, work = options["growth_rate"], options["in_channels"], 0
    bottleneck = growth * options["bn_size"]
    if network.kind == "model":
        channels = options["num_init_features"] or 2 * growth
        shrink = 1 if options["small_inputs"] else 2
        height, width = (height + shrink - 1) // shrink, (width + shrink - 1) // shrink
        work = height * width * options["in_channels"] * channels * (9 if shrink == 1 else 49)
        height, width = (height + shrink - 1) // shrink, (width + shrink - 1) // shrink
    for i, count in enumerate(options.get("block_config") or [options.get("num_layers", 1)]):
        if i:
            outputs = int(channels * options["compression"])
            work += height * width * channels * outputs
            channels, height, width = outputs, height // 2, width // 2
        for _ in range(count):
            work += height * width * bottleneck * (channels + 9 * growth)
            channels += growth
    return network.samples * work, network.samples * height * width, height * width
