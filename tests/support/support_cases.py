"""Things that users do to a network, each as a function of the network that returns tensors to compare.

The argument is this package's network, torchvision's with the same weights, converted or not; the results of the
unconverted one are right by definition.
The keys are the first column of docs/support.md.
"""

import copy
from unittest.mock import patch

import tool_cases as tools
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from small_networks import norms
from tool_cases import LAYER, images, step
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune
from torch.testing._internal.two_tensor import TwoTensor


def under(context, run):
    def run_under(model):
        with context():
            return run(model)

    return run_under


def with_hook(path, method, times=1):
    def run(model):
        seen = []
        module = model.get_submodule(path)
        handle = getattr(module, method)(lambda *args: seen.append(None))
        result = step(model)
        handle.remove()
        assert len(seen) == times, f"the hook ran {len(seen)} times"
        return result

    return run


def hooks_everywhere(model):
    seen = {module: 0 for module in model.modules() if not isinstance(module, nn.ModuleDict)}

    def hook(module, args, output):
        seen[module] += 1

    handles = [module.register_forward_hook(hook) for module in seen]
    handles += [module.register_full_backward_hook(lambda *args: None) for module in seen]
    result = step(model)
    for handle in handles:
        handle.remove()
    assert set(seen.values()) <= {1}, "a hook ran twice"
    return result


def global_hook(model):
    handle = register_module_forward_hook(lambda *args: None)
    try:
        return step(model)
    finally:
        handle.remove()


def dual_numbers(model):
    with forward_ad.dual_level():
        y = model.eval()(forward_ad.make_dual(images(), images(seed=2)))
        return [*forward_ad.unpack_dual(y)]


def functions_of(model):
    return dict(model.named_parameters()), dict(model.named_buffers())


def functional_grad(model):
    params, buffers = functions_of(model.eval())
    loss = torch.func.grad(lambda p: torch.func.functional_call(model, (p, buffers), (images(),)).square().sum())
    return [*loss(params).values()]


def per_sample_gradients(model):
    params, buffers = functions_of(model.eval())
    loss = torch.func.grad(lambda p, x: torch.func.functional_call(model, (p, buffers), (x[None],)).square().sum())
    return [*torch.func.vmap(loss, in_dims=(None, 0))(params, images()).values()]


def ensemble(model):
    models = [copy.deepcopy(model).eval() for _ in range(2)]
    for p in models[1].parameters():
        p.data.mul_(0.9)
    x, (params, buffers) = images(), torch.func.stack_module_state(models)
    return [torch.func.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (x,)))(params, buffers)]


def hypernetwork(model):
    scale = torch.tensor(1.1, dtype=torch.double, requires_grad=True)
    params = {name: p.detach() * scale for name, p in model.named_parameters()}
    torch.func.functional_call(model, params, (images(),)).square().sum().backward()
    return [scale.grad]


def gradient_penalty(model):
    x = images().requires_grad_()
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    dx.square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def backward_twice(model):
    loss = model(images()).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    return [p.grad for p in model.parameters()]


def optimizer_in_backward(model):
    def update(p):
        with torch.no_grad():
            p.sub_(p.grad, alpha=0.01)
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(update)
    for seed in range(2):
        F.cross_entropy(model(images(seed=seed)), torch.arange(3)).backward()
    return [*model.parameters(), *model.buffers()]


def each(change, *kinds):
    """A step after every module of these kinds has been replaced by change(module)."""

    def run(model):
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) in kinds:
                    setattr(parent, name, change(child))
        return step(model)

    return run


def one(change, path=f"{LAYER}.conv2"):
    """The step after change(module), of which what it returns, if anything, takes the module's place."""

    def run(model):
        module = model.get_submodule(path)
        model.set_submodule(path, change(module) or module)
        return step(model)

    return run


class Adapted(nn.Module):
    """A convolution with a low-rank addition, as LoRA has it."""

    def __init__(self, base):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_channels, 1, 1, dtype=torch.double, generator=generator))
        self.up = nn.Parameter(torch.randn(base.out_channels, 2, 1, 1, dtype=torch.double, generator=generator))

    def forward(self, x):
        return self.base(x) + F.conv2d(F.conv2d(x, self.down), self.up)


def frozen_kind(norm):
    from torchvision.ops import FrozenBatchNorm2d

    frozen = FrozenBatchNorm2d(norm.num_features, eps=norm.eps).to(norm.weight)
    frozen.load_state_dict({k: v for k, v in norm.state_dict().items() if k != "num_batches_tracked"})
    return frozen


def narrower(layer, keep=5):
    """Prune a layer: fewer channels in the bottleneck."""
    for module, names, index in ((layer.conv1, ["weight"], 0), (layer.norm2, ["weight", "bias"], 0)):
        for name in names:
            setattr(module, name, nn.Parameter(getattr(module, name).detach().narrow(index, 0, keep).clone()))
    layer.conv2.weight = nn.Parameter(layer.conv2.weight.detach()[:, :keep].clone())
    layer.norm2.running_mean, layer.norm2.running_var = (
        t[:keep].clone() for t in (layer.norm2.running_mean, layer.norm2.running_var)
    )


def replaced(owner, name):
    """A step while a function, or a method of a class, is replaced after the import."""

    def run(model):
        original = getattr(owner, name)
        with patch.object(owner, name, lambda *args, **kwargs: 0.7 * original(*args, **kwargs)):
            return step(model)

    return run


def circular(conv):
    def forward(x, weight, bias):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    conv._conv_forward = forward


def evaluated(model):
    for norm in norms(model):
        norm.eval().requires_grad_(False)
    return step(model)


def shared_norm(model):
    layers = [m for n, m in model.features.denseblock2.named_children()]
    layers[0].norm2.momentum = None
    layers[1].norm2 = layers[0].norm2
    return step(model)


class Tagged(torch.Tensor):
    pass


def subclass(model):
    y = model(images().as_subclass(Tagged))
    assert type(y) is Tagged
    y.as_subclass(torch.Tensor).square().sum().backward()
    return [y.as_subclass(torch.Tensor), *[p.grad for p in model.parameters()]]


def wrapped_tensors(model):
    y = model.eval()(TwoTensor(images(), images()))
    return [y.a, y.b]


def autocast(model):
    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    return step(model.float(), images(dtype=torch.float32), forward)


def half_with_float_norms(model):
    model.bfloat16()
    for norm in norms(model):
        norm.float()
    model.classifier.float()
    model.classifier.register_forward_pre_hook(lambda module, args: args[0].float())
    return step(model, images(dtype=torch.bfloat16))


def wrong_types(model):
    model.features.denseblock2.denselayer2.conv1.float()
    return step(model)


def written_block(model):
    block = model.features.denseblock1
    return step(block, torch.randn(2, 16, 9, 9, dtype=torch.double).requires_grad_(), lambda x: block(x).relu_())


def resized_block(model):
    with torch.no_grad():
        y = model.eval().features.denseblock1(images()[:2, :1, :32, :32].expand(-1, 16, -1, -1).contiguous())
    return [y.resize_(2 * y.numel())[: y.numel() // 2]]


SCENARIOS = {
    # hooks
    "A hook on the network, its first convolution or its classifier": with_hook(
        "features.conv0", "register_forward_hook"
    ),
    "A hook on `features`": with_hook("features", "register_forward_hook"),
    "A hook on a dense block": with_hook("features.denseblock2", "register_forward_hook"),
    "A hook on a transition, or on a part of it": with_hook("features.transition1.norm", "register_forward_hook"),
    "A hook on a dense layer": with_hook(LAYER, "register_forward_hook"),
    "A forward hook on `norm1`, `relu1` or `conv1` of a dense layer": with_hook(
        f"{LAYER}.norm1", "register_forward_hook"
    ),
    "A full backward hook on a part of a dense layer": with_hook(f"{LAYER}.conv1", "register_full_backward_hook"),
    "A hook on `norm2`, `relu2` or `conv2` of a dense layer": with_hook(f"{LAYER}.conv2", "register_forward_pre_hook"),
    "A full backward hook on the stem's norm or ReLU": with_hook("features.relu0", "register_full_backward_hook"),
    "Hooks on all modules": hooks_everywhere,
    "A global hook (`register_module_forward_hook`)": global_hook,
    # differentiation
    "Forward-mode differentiation with dual numbers": dual_numbers,
    "`torch.func.jvp`": under(
        torch.no_grad, lambda model: [*torch.func.jvp(model.eval(), (images(),), (images(seed=2),))]
    ),
    "`torch.func.grad` of `functional_call`": functional_grad,
    "`torch.func.vmap` over images": lambda model: [
        torch.func.vmap(lambda image: model.eval()(image[None])[0])(images())
    ],
    "Per-sample gradients, `vmap(grad)`": per_sample_gradients,
    "Ensembles, `stack_module_state`": ensemble,
    "`functional_call` with other tensors as parameters": hypernetwork,
    "Vectorized Jacobians (`jacobian(vectorize=True)`, `is_grads_batched`)": lambda model: [
        torch.autograd.functional.jacobian(model.eval(), images()[:1], vectorize=True)
    ],
    "Second derivatives (`create_graph=True`)": gradient_penalty,
    "Backward twice (`retain_graph=True`)": backward_twice,
    "A step of the optimizer in backward": optimizer_in_backward,
    "Saved tensors moved elsewhere (`save_on_cpu`)": under(torch.autograd.graph.save_on_cpu, step),
    "`torch.no_grad()`": under(torch.no_grad, lambda model: [model(images()), *model.buffers()]),
    "`torch.inference_mode()`": under(torch.inference_mode, lambda model: [model.eval()(images())]),
    # compilers and files
    "`torch.compile`": lambda model: step(model, forward=torch.compile(model, backend="eager")),
    "`torch.compile(fullgraph=True)`, training": tools.compiled,
    "`torch.export`": tools.exported,
    "`torch.onnx.export`": tools.to_onnx,
    "`torch.jit.trace`": tools.traced,
    "`torch.jit.script`": lambda model: [torch.jit.script(model.eval())(images())],
    "`torch.fx.symbolic_trace`": tools.symbolic,
    "torchvision's `create_feature_extractor`": tools.extracted,
    "`deepcopy`, pickle, state dicts": tools.copied,
    "A moving average of the weights (`AveragedModel`)": tools.averaged,
    # several devices
    "`DataParallel`": tools.replicas,
    "`DistributedDataParallel`": under(
        tools.process_group, lambda model: step(model, forward=nn.parallel.DistributedDataParallel(model))
    ),
    "`SyncBatchNorm`": tools.synchronized_norms,
    "FSDP2, `fully_shard` of every block and the network": tools.sharded("denseblock"),
    "FSDP2, `fully_shard` of transitions, too": tools.sharded("denseblock", "transition"),
    # types
    "`torch.autocast`": autocast,
    "A network in bfloat16 with norms in float32": half_with_float_norms,
    "A convolution of another dtype than its input": wrong_types,
    "A subclass of `Tensor` without data of its own (MONAI's `MetaTensor`, `tv_tensors`)": subclass,
    "A subclass of `Tensor` with data of its own (`__torch_dispatch__`)": wrapped_tensors,
    "Meta tensors": lambda model: [model.to("meta")(images().to("meta")).new_zeros((), device="cpu")],
    # other modules
    "Norms in evaluation mode": evaluated,
    "`FrozenBatchNorm2d` of torchvision and timm": each(frozen_kind, nn.BatchNorm2d),
    "Other norms (`GroupNorm`, `InstanceNorm2d`, `Identity`)": each(
        lambda norm: nn.GroupNorm(1, norm.num_features).double(), nn.BatchNorm2d
    ),
    "One norm in two layers": shared_norm,
    "Another activation in every ReLU's place": each(lambda relu: nn.LeakyReLU(0.3), nn.ReLU),
    "Another pool in a transition": one(lambda pool: nn.MaxPool2d(2), "features.transition1.pool"),
    "Layers of different widths in a block (pruning)": one(narrower, LAYER),
    "Parts frozen by `requires_grad_(False)`": tools.frozen,
    "Low-rank adapters around a convolution (LoRA)": one(Adapted),
    "Low-rank adapters of `peft`": tools.low_rank,
    "Parametrizations (weight, spectral normalization)": one(parametrizations.spectral_norm, f"{LAYER}.conv1"),
    "Masks of `torch.nn.utils.prune`": one(lambda conv: prune.ln_structured(conv, "weight", 0.5, 2, 0)),
    "`_conv_forward` or `forward` of one module replaced": one(circular),
    "`forward` of a class replaced": replaced(nn.BatchNorm2d, "forward"),
    "A function of `torch.nn.functional` replaced": replaced(F, "batch_norm"),
    "`features` cut by an index": lambda model: step(model.features[:6]),
    # outputs
    "Writing into the output of a network or a transition": lambda model: step(
        model, forward=lambda x: model(x).mul_(2)
    ),
    "Writing into the output of a dense block": written_block,
    "`resize_` of the output of a dense block": resized_block,
}
# These may have at most twice plain's error, against float64.
LOWER = (autocast, half_with_float_norms)
# These ask for the modules to be called, so the fallback is not reported.
SILENT = (tools.symbolic, tools.extracted, tools.exported, tools.to_onnx, tools.traced)
# In these the other implementations end with an error of PyTorch's.
PYTORCH_REFUSES = (tools.compiled, tools.synchronized_norms, wrong_types)
