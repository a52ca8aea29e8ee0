"""Memory and time of a training step of any model: plain, with its library's checkpointing, and converted.

The model is named as library:name, or as path/to/file.py:function, which takes no arguments and returns the model.
Before anything is measured, the converted model is compared with the plain one in float64 on the first two samples:
outputs, gradients and buffers, in training and in evaluation mode.
"""

import copy
import difflib
import importlib
import importlib.util
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils import _pytree as pytree
from tqdm import tqdm

import densenet_ext
from bench import MB, timing
from bench.memory_meter import measure_memory
from bench.steps import TrainingStep
from bench.tables import Column, paragraphs, quantiles_column, table_of

TITLE = "Memory and time of a training step of any model"
LIMIT = 1e-6  # float64: largest difference over largest value
LIBRARIES = {"torchvision": "torchvision.models", "timm": "timm", "monai": "monai.networks.nets"}


class ModelError(ValueError):
    """There is no such model, or it cannot be compared."""


class Step(TrainingStep):
    """A training step of any model. Its loss is the mean square of all outputs."""

    def __init__(self, model, batch, dtype):
        self.model, self.batch, self.dtype = model, batch, dtype
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, fused=True)
        self.spec = SimpleNamespace(device=batch.device.type)
        self()  # momentum is there, threads have started

    def forward(self):
        lower = self.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(self.spec.device, self.dtype) if lower else nullcontext():
            return sum(y.float().square().mean() for y in tensors(self.model(self.batch)))


def tensors(output):
    """The floating-point tensors of any output."""
    return [y for y in pytree.tree_leaves(output) if isinstance(y, torch.Tensor) and y.is_floating_point()]


def build(name, size):
    """The model that `name` stands for, in training mode, and its twin with the library's checkpointing, or None.

    size: the input's, [N, C, pixels]; MONAI's networks take C and the number of dimensions from it.
    """
    library, colon, what = name.rpartition(":")
    if not colon:
        raise ModelError(f"--model {name}: it must be library:name or path/to/file.py:function")
    if library.endswith(".py"):
        return _from_file(Path(library), what), None
    if library not in LIBRARIES:
        raise ModelError(f"--model {name}: the library may be {', '.join(LIBRARIES)}, or a file that ends in .py")
    try:
        module = importlib.import_module(LIBRARIES[library])
    except ImportError as error:
        raise ModelError(f"--model {name} needs {library}: pip install {library} ({error})") from None
    return _BUILDERS[library](module, what, size)


def _from_file(path, function):
    if not path.is_file():
        raise ModelError(f"--model: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ModelError(_unknown(function, [n for n, v in vars(module).items() if callable(v)], str(path)))
    model = getattr(module, function)()
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"{function} of {path} returns a {type(model).__name__}; it must return a torch.nn.Module")
    return model


def _torchvision(models, name, size):
    if name not in models.list_models():
        raise ModelError(_unknown(name, models.list_models(), "torchvision"))
    plain, checkpointed = models.get_model(name, weights=None), None
    if isinstance(plain, models.DenseNet):
        checkpointed = models.get_model(name, weights=None, memory_efficient=True)
    return plain, checkpointed


def _timm(timm, name, size):
    if not timm.is_model(name):
        raise ModelError(_unknown(name, timm.list_models(), "timm"))
    make = partial(timm.create_model, name, pretrained=False, in_chans=size[1])
    plain, checkpointed = make(), make()
    try:
        checkpointed.set_grad_checkpointing(True)
    except (AssertionError, AttributeError):
        checkpointed = None
    return plain, checkpointed


def _monai(nets, name, size):
    if not hasattr(nets, name):
        raise ModelError(_unknown(name, dir(nets), "monai.networks.nets"))
    return getattr(nets, name)(spatial_dims=len(size) - 2, in_channels=size[1], out_channels=1000), None


_BUILDERS = {"torchvision": _torchvision, "timm": _timm, "monai": _monai}


def _unknown(name, names, where):
    near = difflib.get_close_matches(name, names, cutoff=0.4)
    return f"{where} has no {name}" + (f"; near names: {', '.join(near)}" if near else "")


def check(plain, converted, batch):
    """The largest difference of two models in float64 over the largest value, by kind; raises if it is over the limit."""
    x = batch[:2].double()
    errors = {"outputs": 0.0, "gradients": 0.0, "buffers": 0.0}
    for training in (True, False):
        found = []
        for model in (plain, converted):
            model = copy.deepcopy(model).double().train(training)
            torch.manual_seed(0)  # dropout
            outputs = tensors(model(x))
            sum(y.square().mean() for y in outputs).backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            found.append({"outputs": outputs, "gradients": gradients, "buffers": [*model.buffers()]})
        for kind in errors:
            pairs = [(a.double(), b.double()) for a, b in zip(*(part[kind] for part in found), strict=True)]
            largest = max((a.abs().max().item() for a, _ in pairs), default=0.0)
            difference = max(((a - b).abs().max().item() for a, b in pairs), default=0.0)
            errors[kind] = max(errors[kind], difference / max(largest, 1e-30))
    worst = max(errors, key=errors.get)
    if not errors[worst] <= LIMIT:
        raise ModelError(f"the converted model disagrees: its {worst} differ by {errors[worst]:.0e}")
    return errors


def measure(args, size, began):
    """Report, compare and measure; returns the results. `began`: when the command started, for its time limit."""
    plain, checkpointed = build(args.model, size)
    plain.to(args.device)
    batch = torch.randn(size, device=args.device, dtype=torch.float64 if args.dtype == "float64" else torch.float32)
    if args.dtype == "float64":
        plain.double()
    models = {"plain": plain, "checkpointed by the library": checkpointed}
    for name, keep in (("converted", False), ("converted, bottlenecks kept", True)):
        models[name] = copy.deepcopy(plain)
        report = densenet_ext.convert(models[name], keep_bottleneck=keep)
    print(f"{report}\n", flush=True)
    if not report.fused:
        raise ModelError(f"nothing of {args.model} can be fused")
    agreement = check(plain, models["converted"], batch)
    if checkpointed is not None:
        checkpointed.to(batch)
        checkpointed.load_state_dict(plain.state_dict())
    rows, steps, dtype = [], {}, getattr(torch, args.dtype)
    for name in tqdm([name for name in models if models[name] is not None], desc="memory", disable=None):
        steps[name] = Step(models[name].train(), batch, dtype)
        memory = measure_memory(steps[name])
        rows.append({"implementation": name, "peak_bytes": memory.peak_bytes, "kept_bytes": memory.kept_bytes})
    deadline = began + args.time_limit
    times = timing.interleave({n: partial(timing.wall_seconds, s) for n, s in steps.items()}, args.rounds, deadline)
    for row in rows:
        row |= timing.quantile_row(times[row["implementation"]]) | {"rounds": len(times[row["implementation"]])}
        row["memory_ratio"] = rows[0]["peak_bytes"] / row["peak_bytes"]
        row["time_ratio"] = rows[0]["seconds"] / row["seconds"]
    settings = {"model": args.model, "input": list(size), "dtype": args.dtype}
    return {"settings": settings, "agreement": agreement, "report": str(report), "rows": rows}


def body(results):
    """The comparison in a sentence, and the table."""
    settings, errors = results["settings"], results["agreement"]
    size = "x".join(map(str, settings["input"]))
    agreed = ", ".join(f"{kind} to {error:.0e}" for kind, error in errors.items())
    columns = [
        Column("implementation", "implementation"),
        Column("peak MB", "peak_bytes", "{:.0f}", 1 / MB),
        Column("less", "memory_ratio", "{:.1f}x"),
        Column("kept MB", "kept_bytes", "{:.0f}", 1 / MB),
        Column("s a step", "seconds", "{:.3f}"),
        quantiles_column(3, 1),
        Column("faster", "time_ratio", "{:.2f}x"),
    ]
    return paragraphs(
        f"Converted and plain agree in float64, in training and in evaluation mode: {agreed}.",
        f"{settings['model']}, input {size}, {settings['dtype']}",
        table_of(columns, results["rows"]),
        "peak: highest level in a training step, over parameters, gradients and momentum; kept: of it, what lives from "
        f"forward to backward. Times: medians of {results['rows'][0]['rounds']} interleaved steps.",
    )
