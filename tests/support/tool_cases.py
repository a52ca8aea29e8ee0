"""Scenarios with what stands around a network: compilers, files, several processes and devices, copies, adapters.

support_cases.py has the others, and says what the functions are.
"""

import copy
import functools
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import small_networks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from densenet_ext._features import FusedBlock

LAYER = "features.denseblock2.denselayer2"

images = functools.partial(small_networks.images, 3, (40, 40))


def step(model, x=None, forward=None):
    return small_networks.step(model, images() if x is None else x, forward)


def copies(tensors):
    return [t.detach().clone() for t in tensors]


def compiled(model):
    """Three training steps by one graph."""
    torch._dynamo.reset()
    forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        return [t for _ in range(3) for t in copies(step(model, forward=forward))]


def exported(model):
    model.eval()
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("samples")},))
    assert not any("densenet_ext" in str(node.target) for node in program.graph.nodes)
    return [program.module()(small_networks.images(2, (40, 40)))]


def to_onnx(model):
    """The file's operators are ONNX's own, and compute the same by ONNX's reference implementation."""
    reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(model.eval(), (images(),), dynamo=True, verbose=False).model_proto
    assert {node.domain for node in program.graph.node} == {""}
    (name,) = (value.name for value in program.graph.input)
    return [torch.from_numpy(y) for y in reference.ReferenceEvaluator(program).run(None, {name: images().numpy()})]


def traced(model):
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model.eval(), images(), check_trace=False), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert not any("densenet_ext" in node.kind() for node in loaded.inlined_graph.nodes())
    return [loaded(small_networks.images(2, (48, 48)))]


def extracted(model):
    from torchvision.models.feature_extraction import create_feature_extractor

    nodes = ["features.norm0", "features.denseblock2", "features.transition2.norm", "features.norm5"]
    return [*create_feature_extractor(model.eval(), nodes)(images()).values()]


def symbolic(model):
    return [torch.fx.symbolic_trace(model.eval())(images())]


@contextmanager
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def synchronized_norms(model):
    with process_group():
        ours = isinstance(model.features.denseblock1, FusedBlock)  # PyTorch's SyncBatchNorm takes no tensors on a CPU
        return step(nn.SyncBatchNorm.convert_sync_batchnorm(model) if ours else model)


def sharded(*kinds):
    """A step of a network of which FSDP2 shards the parts of these names, and the rest."""

    def run(model):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        with process_group():
            mesh = init_device_mesh("cpu", (1,))
            for name, module in model.features.named_children():
                if name.startswith(kinds):
                    fully_shard(module, mesh=mesh)
            fully_shard(model, mesh=mesh)
            return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in step(model)]

    return run


def replicas(model):
    """Run a module as nn.DataParallel does, on two threads. It needs no GPUs: the replicas are created here."""

    def replicate(module):
        replica = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicate(child)
        for name, p in module._parameters.items():
            setattr(replica, name, None if p is None else p.clone())
        for name, b in module._buffers.items():
            replica._buffers[name] = b.clone()
        return replica

    copies = [replicate(model), replicate(model)]
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda copied, x: copied(x), copies, [images(seed=0), images(seed=1)]))
    (outputs[0].square().sum() + outputs[1].square().sum()).backward()
    return [*outputs, *[p.grad for p in model.parameters()]]


def copied(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    other.load_state_dict(torch.load(file))
    return step(other)


def averaged(model):
    """Two steps with a moving average of the weights, and its output with statistics of its own."""
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for seed in range(2):
        F.cross_entropy(model(images(seed=seed)), torch.arange(3)).backward()
        optimizer.step()
        average.update_parameters(model)
    torch.optim.swa_utils.update_bn([images(seed=3)], average)
    return [average.eval()(images()), *average.parameters(), *average.buffers()]


def frozen(model):
    """Only the classifier and the norms of the last block learn."""
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    for norm in small_networks.norms(model.features.denseblock3):
        norm.requires_grad_(True)
    y = model(images())
    y.square().sum().backward()
    return [y, *[p.grad for p in model.parameters() if p.requires_grad], *model.buffers()]


def low_rank(model):
    """A step of peft's adapters of a convolution and the classifier, and the output after they are merged."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=[f"{LAYER}.conv2", "classifier"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    y = adapted(images())
    y.square().sum().backward()
    gradients = [p.grad for p in adapted.parameters() if p.requires_grad]
    return [y, *gradients, adapted.merge_and_unload().eval()(images())]
