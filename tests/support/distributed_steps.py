"""Training steps in one process or several: a network that FSDP2 has sharded, or with norms that share statistics."""

import copy
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fused_networks import fused_network
from small_networks import images
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from densenet_ext import functional, set_fallback


def shard(model, *kinds, **options):
    """Shard the features whose names start with one of these, and the network; `options` are fully_shard's."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name, module in model.features.named_children():
        if name.startswith(kinds):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def tails(run):
    """Return how many modules each stage had as its tail while `run` ran."""
    counts, stage = [], functional.dense_stage

    def counted(x, layers, *tail, **options):
        counts.append(len(tail))
        return stage(x, layers, *tail, **options)

    with patch.object(functional, "dense_stage", counted):
        run()
    return counts


def _full(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def train(model, sharded):
    """Return outputs, gradients and parameters of two training steps, with statistics; without FSDP2, gradients are averaged
    here. Each process takes its own images."""
    optimizer, results = torch.optim.SGD(model.parameters(), 0.05), []
    for i in range(2):
        optimizer.zero_grad()
        y = model(images(3, (40, 40), seed=10 * i + dist.get_rank()))
        F.cross_entropy(y, torch.arange(3)).backward()
        for p in () if sharded else model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
        results += [y.detach(), *[_full(p.grad).clone() for p in model.parameters()]]
        optimizer.step()
    with torch.no_grad():
        results.append(model.eval()(images(3, (40, 40))))
    return [*results, *[_full(p).detach() for p in model.parameters()], *model.buffers()]


def assert_sharded_equals_whole(name, *kinds):
    """Return the tails of the sharded network's stages."""
    want, model, got = train(fused_network(name), False), shard(fused_network(name), *kinds), []
    counts = tails(lambda: got.extend(train(model, True)))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    return counts


def assert_synchronized_equals_whole(name):
    """Norms that share their statistics make the halves of a batch in two processes what the batch is in one."""
    whole = fused_network(name)
    whole.features.norm0.eval()  # PyTorch's SyncBatchNorm takes no tensors on a CPU, and the fused stem shares nothing
    shared = _synchronized(name)(copy.deepcopy(whole))
    shared.features.norm0 = copy.deepcopy(whole.features.norm0)
    x, labels = images(6, (40, 40)), torch.arange(6) % 5
    half = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    F.cross_entropy(shared(x[half]), labels[half]).backward()
    F.cross_entropy(whole(x), labels).backward()
    for p in shared.parameters():
        dist.all_reduce(p.grad)
        p.grad /= 2
    got, want = ([*[p.grad for p in model.parameters()], *model.buffers()] for model in (shared, whole))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def _synchronized(name):
    if name == "timm":
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm
    return nn.SyncBatchNorm.convert_sync_batchnorm


def run_process(rank, world, file, name):
    """Be one of `world` processes, which torch.multiprocessing starts."""
    torch.set_num_threads(1)
    set_fallback("error")
    dist.init_process_group("gloo", store=dist.FileStore(file, world), rank=rank, world_size=world)
    try:
        assert assert_sharded_equals_whole(name, "denseblock") == 3 * [2, 2, 1]
        assert_synchronized_equals_whole(name)
    finally:
        dist.destroy_process_group()
