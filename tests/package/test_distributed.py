"""FSDP2, where a sharded block and what consumes it are one op; and norms that share statistics."""

import copy

import distributed_steps
import pytest
import torch
from distributed_steps import assert_sharded_equals_whole, shard, tails
from fused_networks import fused_network
from small_networks import images, step
from tool_cases import process_group
from torch.distributed.fsdp import MixedPrecisionPolicy

from densenet_ext import convert, revert, set_fallback

torchvision = pytest.importorskip("torchvision")
NAMES = ["built", "torchvision"]
LIBRARIES = ["timm", "MONAI"]
SIZE = (40, 40)
STAGES, ALONE = [2, 2, 1], [0, 0, 1]


@pytest.fixture
def group():
    with process_group():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES + LIBRARIES)
def test_two_processes(name, tmp_path):
    """Blocks are sharded, then norms are synchronized: both are what the whole network is."""
    torch.multiprocessing.spawn(distributed_steps.run_process, (2, str(tmp_path / "store"), name), nprocs=2)


@pytest.mark.parametrize("name", NAMES + LIBRARIES)
def test_sharded_blocks_are_stages(name, group):
    assert assert_sharded_equals_whole(name, "denseblock") == 3 * STAGES


@pytest.mark.parametrize("name", NAMES)
def test_sharded_transitions_are_called(name, group):
    set_fallback("warn")
    with pytest.warns(UserWarning, match="features.transition1 is sharded by itself"):
        assert assert_sharded_equals_whole(name, "denseblock", "transition") == 3 * ALONE


@pytest.mark.parametrize("name", NAMES)
def test_hooks_of_users_are_called(name, group):
    set_fallback("warn")
    model, seen = shard(fused_network(name), "denseblock"), []
    model.features.denseblock1.register_forward_hook(lambda module, args, y: seen.append(y.shape[1]))
    with pytest.warns(UserWarning, match="features.denseblock1 has a forward hook"):
        assert tails(lambda: model(images(3, SIZE)).sum().backward()) == [0, 2, 1]
    channels = fused_network(name).features.transition1.norm.num_features
    assert seen == [channels]


@pytest.mark.parametrize("name", NAMES)
def test_layers_that_differ_are_called(name, group):
    """One op turns out not to serve a block inside its call, which is repeated."""
    set_fallback("warn")
    whole, sharded = fused_network(name), fused_network(name)
    for model in (whole, sharded):
        model.features.denseblock2.denselayer2.drop_rate = 0.3
    shard(sharded, "denseblock")
    with pytest.warns(UserWarning, match="denselayer2 has drop_rate 0.3"):
        want, got = (seeded_step(model) for model in (whole, sharded))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def seeded_step(model):
    torch.manual_seed(7)
    return [getattr(t, "full_tensor", lambda t=t: t)() for t in step(model, images(3, SIZE))]


def test_conversion_after_sharding(group):
    model = fused_network("torchvision")
    revert(model)
    want = seeded_step(copy.deepcopy(model))
    kinds = [type(module) for module in shard(model, "denseblock").modules()]
    convert(model)
    results = []
    assert tails(lambda: results.extend(step(model, images(3, SIZE)))) == STAGES
    torch.testing.assert_close(
        [getattr(t, "full_tensor", lambda t=t: t)() for t in results], want, rtol=1e-9, atol=1e-9
    )
    revert(model)
    assert [type(module) for module in model.modules()] == kinds


def test_sharded_conversion_is_not_reverted(group):
    model = shard(fused_network("torchvision"), "denseblock")
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match="model has become a FSDPDenseNet since the conversion"):
        revert(model)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("name", NAMES)
def test_mixed_precision(name, group):
    """In one precision a stage computes what it does without FSDP2; where the output of a block is cast to another one than
    the block has, the block is alone."""
    x = images(3, SIZE, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    whole = fused_network(name).float()
    for p in whole.parameters():
        p.data = p.bfloat16()
    sharded, got = shard(fused_network(name).float(), "denseblock", mp_policy=policy), []
    assert tails(lambda: got.append(sharded(x))) == STAGES
    assert torch.equal(got[0], whole(x.bfloat16()))

    set_fallback("warn")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    model = fused_network(name).float()
    shard_blocks_alone(model, policy)
    with pytest.warns(
        UserWarning, match="features.denseblock1 is sharded with a MixedPrecisionPolicy of another dtype"
    ):
        assert tails(lambda: model(x)) == [0, 0, 0]


def shard_blocks_alone(model, policy):
    for name, module in model.features.named_children():
        if name.startswith("denseblock"):
            distributed_steps.fully_shard(
                module, mesh=distributed_steps.init_device_mesh("cpu", (1,)), mp_policy=policy
            )
