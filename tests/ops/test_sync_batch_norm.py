"""Batch statistics shared by processes: two processes with half a batch each equal one process with the whole batch."""

import copy
import sys
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from decisions import clear_input
from torch import nn

import densenet_ext
from densenet_ext import DenseNetBC, EfficientDenseBlock, EfficientDenseLayer, _plain_layer, _stage_arguments
from densenet_ext._masks import Masks, draw_masks

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = 2
TOLERANCE = dict(rtol=1e-9, atol=1e-11)  # float64


def work(rank, address, connection):
    """Body of one process of the group: runs the functions that it is sent, until it is sent None."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", address, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=60))
    while (task := connection.recv()) is not None:
        densenet_ext.set_fallback("error")
        try:
            connection.send((None, task(rank)))
        except Exception:
            connection.send((traceback.format_exc(), None))
    dist.destroy_process_group()


class Processes:
    """The processes of one gloo group. They are started once for all tests, because that takes seconds."""

    def __init__(self, folder):
        context = mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(PROCESSES)]
        self.connections = [ours for ours, _ in pipes]
        arguments = [(rank, f"file://{folder}/meeting", theirs) for rank, (_, theirs) in enumerate(pipes)]
        sys.path.append(str(ROOT))  # so that a new process finds this module under the name that pytest gave it
        self.processes = [context.Process(target=work, args=a, daemon=True) for a in arguments]
        for process in self.processes:
            process.start()
        sys.path.remove(str(ROOT))

    def __call__(self, function, *arguments):
        """Call function(*arguments, rank) in each process, and return the results in order."""
        for connection in self.connections:
            connection.send(partial(function, *arguments))
        results = []
        for connection in self.connections:
            assert connection.poll(120), "a process does not answer"
            results.append(connection.recv())
        for error, _ in results:
            assert error is None, error
        return [result for _, result in results]

    def close(self):
        for connection, process in zip(self.connections, self.processes, strict=True):
            connection.send(None)
            process.join(20)
            process.kill()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    processes = Processes(tmp_path_factory.mktemp("group"))
    yield processes
    processes.close()


def network(**options):
    torch.manual_seed(0)
    net = DenseNetBC(4, 16, num_classes=5, efficient="fused", **options).double().train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # or its affine parameters would be 1 and 0
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return net


def batch(samples=6, seed=1):
    torch.manual_seed(seed)
    return torch.randn(samples, 3, 12, 12, dtype=torch.float64), torch.randint(5, (samples,))


def numbers(net, x, output):
    """The results of a training step: output, gradients and buffers."""
    named = {"output": output.detach(), "grad of x": x.grad}
    named |= {f"grad of {name}": p.grad for name, p in net.named_parameters()}
    return named | {name: b.clone() for name, b in net.named_buffers()}


def step(net, x, labels, samples):
    """Run forward and backward for some of `samples` samples; the loss is the mean over all of them."""
    x = x.clone().requires_grad_()
    output = net(x)
    loss = nn.functional.cross_entropy(output, labels, reduction="sum") / samples
    loss.backward()
    return numbers(net, x, output)


def synchronized(net, group=None):
    """A copy of the net with SyncBatchNorm: tensors that were sent share their memory with the other process."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net), group)


def synchronized_step(net, masks, sizes, rank):
    """One process's part of a step; sizes: the number of samples of each process."""
    net = synchronized(net)
    x, labels = batch(sum(sizes))
    start = sum(sizes[:rank])
    mine = slice(start, start + sizes[rank])
    with drawing(prepared(masks, mine)):
        return step(net, x[mine], labels[mine], sum(sizes))


@contextmanager
def drawing(draw):
    """A context in which layers of all implementations get their masks from `draw`."""
    original = _stage_arguments.draw_masks
    _stage_arguments.draw_masks = _plain_layer.draw_masks = draw
    try:
        yield
    finally:
        _stage_arguments.draw_masks = _plain_layer.draw_masks = original


def drawn_masks(net, x):
    """The masks of all layers for the whole batch, in the order of the layers."""
    masks = []

    def draw(*arguments):
        masks.append(draw_masks(*arguments))
        return masks[-1]

    with drawing(draw), torch.no_grad():
        copy.deepcopy(net)(x)
    return masks


def prepared(masks, samples):
    """A function that returns these masks one after the other, each with the rows of some samples only."""
    rest = iter(masks)
    return lambda *_: Masks(*(m if m is None else m[samples].contiguous() for m in next(rest)))


def merged(parts):
    """Merge the results of the processes: concatenate samples, and sum the gradients of parameters."""
    whole = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name in ("output", "grad of x"):
            whole[name] = torch.cat(values)
        elif name.startswith("grad of"):
            whole[name] = sum(values)
        else:
            torch.testing.assert_close(values[0], values[1], rtol=0, atol=0)  # running statistics are equal everywhere
            whole[name] = values[0]
    return whole


def plain(net):
    net = copy.deepcopy(net)
    net.efficient = False
    return net


DROPPING = dict(drop_channel=0.3, se_reduction=2)
CASES = {  # options of the network, and samples of each process
    "squeeze-and-excitation": (dict(se_reduction=2), (3, 3)),
    "bottlenecks kept": (dict(keep_bottleneck=True), (3, 3)),
    "cumulative average": (dict(momentum=None), (3, 3)),
    "Drop-Channel before norms": (DROPPING, (3, 3)),
    "Drop-Channel before convolutions": (dict(drop_channel=0.3, drop_channel_position="pre_conv"), (3, 3)),
    "uneven": (DROPPING, (5, 1)),
    "one without samples": (DROPPING, (6, 0)),
}


@pytest.mark.parametrize(("options", "sizes"), CASES.values(), ids=CASES.keys())
def test_two_processes_equal_one(processes, options, sizes):
    """Outputs, gradients and running statistics equal plain PyTorch's with the whole batch in one process."""
    net, (x, labels) = network(**options), batch()
    masks = drawn_masks(net, x)
    with drawing(prepared(masks, slice(None))):
        want = step(plain(net), x, labels, len(x))
    got = merged(processes(synchronized_step, net, masks, sizes))
    torch.testing.assert_close(got, want, **TOLERANCE)


def whole_layers(rank):
    """Results of a layer and of a block without a tail, and the number of collectives in forward and in all."""
    counts, results = Counter(), []
    for make in (EfficientDenseLayer, partial(EfficientDenseBlock, 3)):
        torch.manual_seed(0)
        module = nn.SyncBatchNorm.convert_sync_batchnorm(make(6, 4, efficient="fused").double())
        x = torch.randn(6, 6, 5, 5, dtype=torch.float64)[3 * rank : 3 * rank + 3].requires_grad_()
        with counted_collectives(counts):
            output = module(x)
            forward = dict(counts)
            output.square().sum().backward()
        results.append((numbers(module, x, output), forward, dict(counts)))
        counts.clear()
    return results


@contextmanager
def counted_collectives(counts):
    """A context in which calls of torch.distributed's collectives are counted by name."""
    functions = {name: getattr(dist, name) for name in ("all_gather_into_tensor", "all_reduce")}

    def counting(name, *arguments, **options):
        counts[name] += 1
        return functions[name](*arguments, **options)

    for name in functions:
        setattr(dist, name, partial(counting, name))
    yield
    for name, function in functions.items():
        setattr(dist, name, function)


def test_layer_and_block_alone_and_their_collectives(processes):
    """A norm needs one collective in forward and one in backward, where recomputation needs no other."""
    results = processes(whole_layers)
    for index, norms in enumerate((2, 6)):
        parts = [part[index] for part in results]
        for _, forward, both in parts:
            assert forward == {"all_gather_into_tensor": norms}
            assert both == {"all_gather_into_tensor": norms, "all_reduce": norms}
        torch.manual_seed(0)
        module = (EfficientDenseLayer(6, 4) if index == 0 else EfficientDenseBlock(3, 6, 4)).double()
        x = torch.randn(6, 6, 5, 5, dtype=torch.float64).requires_grad_()
        output = module(x)
        output.square().sum().backward()
        torch.testing.assert_close(merged([part[0] for part in parts]), numbers(module, x, output), **TOLERANCE)


def mixed_norms(rank):
    """The warning if only some norms of a stage share their statistics."""
    densenet_ext.set_fallback("warn")
    messages = []
    for name in ("features.denseblock1.denselayer2.norm1", "features.transition1.norm", "features.norm5"):
        net = network()
        parent, _, child = name.rpartition(".")
        norm = net.get_submodule(name)
        net.get_submodule(parent)._modules[child] = nn.SyncBatchNorm(norm.num_features).double()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                net(batch()[0])
            except ValueError as error:  # the plain implementation calls torch's SyncBatchNorm, which needs a GPU
                assert "GPU" in str(error)
        messages.append([str(w.message) for w in caught])
    return messages


def test_norms_of_other_processes_in_one_stage_are_not_fused(processes):
    for messages in processes(mixed_norms):
        assert [sum("shares its batch statistics with other processes" in m for m in some) for some in messages] == [
            1
        ] * 3


def one_process_alone(rank):
    """A norm does not synchronize in a group of one process, nor in evaluation mode."""
    groups = [dist.new_group([other]) for other in range(PROCESSES)]
    net = network(se_reduction=2)
    x, labels = batch()
    want = step(copy.deepcopy(net), x[rank:], labels[rank:], len(x))
    alone = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net), groups[rank])
    torch.testing.assert_close(step(alone, x[rank:], labels[rank:], len(x)), want, rtol=0, atol=0)
    frozen = nn.SyncBatchNorm.convert_sync_batchnorm(net).eval()
    if rank == 0:  # were anything reduced, this process would wait for the other
        torch.testing.assert_close(frozen(x), plain(network(se_reduction=2)).eval()(x), **TOLERANCE)
    return True


def test_nothing_is_reduced_where_nothing_is_shared(processes):
    assert all(processes(one_process_alone))


def one_value_a_channel(rank):
    """A batch of one sample with one pixel has a variance only together with the other process's batch."""
    torch.manual_seed(0)
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(EfficientDenseLayer(6, 4, efficient="fused").double())
    x = torch.randn(2, 6, 1, 1, dtype=torch.float64)
    return layer(x[rank : rank + 1]).detach()


def test_one_value_a_channel_in_each_process(processes):
    torch.manual_seed(0)
    layer = EfficientDenseLayer(6, 4).double()
    want = layer(torch.randn(2, 6, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(torch.cat(processes(one_value_a_channel)), want, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_precision_of_training(processes, dtype):
    """Errors, under autocast too, are at most twice those of the same net with the whole batch in one process."""
    net = network(se_reduction=2)
    x, labels = clear_input(net, lambda seed: batch(seed=seed)[0].float()), batch()[1]
    exact = step(plain(net), x.double(), labels, len(x))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        one = step(copy.deepcopy(net).float(), x, labels, len(x))
    two = merged(processes(cast_step, net, dtype, x, labels))
    for name, want in exact.items():
        if want.is_floating_point():
            error, bound = ((numbers[name].double() - want).norm() for numbers in (two, one))
            # Over 12 seeds, squeeze-and-excitation's biases were off by up to 5e-5 in one process, plain's by 3e-5.
            assert error <= 2 * bound + 5e-5 * want.norm(), name


def cast_step(net, dtype, x, labels, rank):
    net = synchronized(net).float()
    mine = slice(3 * rank, 3 * rank + 3)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return step(net, x[mine], labels[mine], len(x))


def test_one_process_is_an_ordinary_norm():
    """Without a process group, SyncBatchNorm is BatchNorm2d, and the stage is fused."""
    net, (x, labels) = network(se_reduction=2), batch()
    want = step(copy.deepcopy(net), x, labels, len(x))
    got = step(nn.SyncBatchNorm.convert_sync_batchnorm(net), x, labels, len(x))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
