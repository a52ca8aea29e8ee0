"""The memory that a training step takes, and the memory that stays occupied after it."""

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from allocations import allocations

from densenet_ext import _C, DenseNetBC, memory, release_workspaces, set_workspace_limit, workspace_use
from densenet_ext.functional import dense_stage

MB = 1e6


def peak_of_step(model, batch, labels):
    """Return the highest level of allocated bytes in forward and backward, over the level at the start.

    Gradients exist already at the start. Workspaces do not come from torch's allocator: all that they occupy after the
    step is added.
    """

    def step():
        model.zero_grad(set_to_none=False)
        F.cross_entropy(model(batch), labels).backward()

    small = batch[:2, :, :8, :8]
    F.cross_entropy(model(small), labels[:2]).backward()  # allocates the gradients
    release_workspaces()
    start = workspace_use().occupied
    levels = list(accumulate(allocations(step)))
    assert levels
    return max(0, *levels) + workspace_use().occupied - start


def peak_of(samples, **options):
    torch.set_num_threads(2)
    model = DenseNetBC.variant("A+B+C", **options)
    return peak_of_step(model, torch.randn(samples, 3, 32, 32), torch.randint(100, (samples,)))


def problem(name, **options):
    """A variant of the network, and a batch for it."""
    return DenseNetBC.variant(name, **options), torch.randn(16, 3, 32, 32)


def gradients(model, x):
    return torch.autograd.grad(model(x).sum(), list(model.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize(("keep_bottleneck", "limit"), [(False, 180), (True, 430)])
def test_peak_of_the_paper_network(keep_bottleneck, limit):
    """DenseNet-BC (L=100, k=12), batch 64 of 32x32, float32: three feature buffers of 57 + 20 + 6 MB, one gradient buffer."""
    assert peak_of(64, keep_bottleneck=keep_bottleneck) / MB <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_between_stages_takes_no_room_of_its_own(dtype):
    """The first stage takes no more memory in a network than alone: the gradient is freed before its layers take their
    workspaces, and lies where these will lie. This holds for the first step and later ones."""
    torch.set_num_threads(2)
    model = DenseNetBC.variant("vanilla", depth=70, efficient="fused", num_classes=10).to(dtype)
    images = torch.randn(32, 3, 32, 32, dtype=dtype)
    block, transition = model.features.denseblock1, model.features.transition1
    x = model.features.conv0(images).detach().requires_grad_()

    def occupied(run):
        release_workspaces()
        levels = set()
        for _ in range(3):
            run().float().sum().backward()
            x.grad = None
            levels.add(workspace_use().occupied)
        return levels

    alone = occupied(lambda: dense_stage(x, block.layers, transition.norm, transition.conv))
    assert len(alone) == 1
    assert occupied(lambda: model(images)) == alone


def test_fused_takes_a_fraction_of_plain():
    """In a smaller network, too, fused takes less than checkpoint, and that less than plain."""
    sizes = {"depth": 40, "samples": 8}
    plain, checkpoint, fused = (peak_of(**sizes, efficient=e) for e in (False, "checkpoint", "fused"))
    assert fused < 0.25 * plain
    assert fused < 0.5 * checkpoint
    assert checkpoint < 0.7 * plain


def test_nothing_is_left_after_the_step():
    """Two steps leave no more memory held than before: no buffer outlives its graph."""
    torch.set_num_threads(2)
    model, x = problem("A+B+C", depth=22)
    model(x).sum().backward()
    assert sum(allocations(lambda: model(x).sum().backward())) == 0
    assert workspace_use().held == 0


def test_workspaces_stay_for_the_next_step_until_released():
    torch.set_num_threads(2)
    model, x = problem("A+B+C", depth=22)
    release_workspaces()
    model(x).sum().backward()
    after_one = workspace_use()
    assert after_one.held == 0
    assert after_one.occupied > 16 * 72 * 32 * 32 * 4  # the first block's feature buffer at least
    model(x).sum().backward()
    assert workspace_use() == after_one
    release_workspaces()
    assert workspace_use() == (0, 0)


def test_memory_in_the_words_of_torch_cuda():
    """Allocated while the graph lives, reserved until the cache is emptied; the names at the top level say the same."""
    model, x = problem("A+B+C", depth=22)
    memory.empty_cache()
    assert (memory.memory_allocated(), memory.memory_reserved()) == (0, 0)
    y = model(x)
    features = 16 * 72 * 32 * 32 * 4  # bytes of the first block's feature buffer, which backward needs
    assert features <= memory.memory_allocated() <= memory.memory_reserved()
    assert workspace_use() == (memory.memory_allocated(), memory.memory_reserved())
    y.sum().backward()
    del y
    assert memory.memory_allocated() == 0
    assert memory.memory_reserved() >= features
    memory.empty_cache()
    assert workspace_use() == (0, 0)
    assert (release_workspaces, set_workspace_limit) == (memory.empty_cache, memory.set_limit)


def test_workspace_limit():
    """With limit 0 nothing stays occupied beyond whole pages of 2 MB, and the numbers are the same."""
    torch.set_num_threads(2)
    model, x = problem("B", depth=22, efficient="fused", drop_rate=0.0)
    expected = gradients(model, x)
    set_workspace_limit(0)
    try:
        actual = gradients(model, x)
        assert workspace_use().occupied <= 2 * 2**21
    finally:
        set_workspace_limit(2**40)
    assert all(a.equal(b) for a, b in zip(actual, expected, strict=True))


MACHINE, NONE_V1 = 64 << 30, 9223372036854771712  # bytes; the latter stands for no limit in version 1 of control groups
V1 = "11:cpu,cpuacct:/job\n4:memory:/job/step\n0::/init.scope\n"  # a mixture of both versions, as systemd sets it up

# name: (/proc/self/cgroup, files below /sys/fs/cgroup, the limit that follows)
CONTROL_GROUPS = {
    "no files at all": (None, {}, MACHINE),
    "no groups": ("", {"memory.max": "1000\n"}, MACHINE),
    "version 2 without limits": ("0::/a\n", {"a/memory.max": "max\n", "a/memory.high": "max\n"}, MACHINE),
    "version 2": ("0::/a/b\n", {"a/b/memory.max": "4000\n", "a/memory.max": "max\n"}, 4000),
    "the group's own limit is larger": ("0::/a/b\n", {"a/b/memory.max": "4000\n", "a/memory.max": "3000\n"}, 3000),
    "the soft limit is lower": ("0::/a\n", {"a/memory.max": "4000\n", "a/memory.high": "2000\n"}, 2000),
    "the soft limit is higher": ("0::/a\n", {"a/memory.max": "4000\n", "a/memory.high": "5000\n"}, 4000),
    "controller not in the leaf": ("0::/a/b/c\n", {"a/memory.high": "5000\n"}, 5000),
    "a container's own name space": ("0::/\n", {"memory.max": "6000\n", "memory.high": "max\n"}, 6000),
    "a container in its host's name space": ("0::/docker/1f\n", {"memory.max": "6000\n"}, 6000),
    "a group above the name space": ("0::/../../a\n", {"memory.max": "6000\n"}, 6000),
    "more than the machine": ("0::/a\n", {"a/memory.max": f"{2 * MACHINE}\n"}, MACHINE),
    "colons in a name": ("0::/a:b\n", {"a:b/memory.max": "7000\n"}, 7000),
    "no newlines": ("0::/a", {"a/memory.max": "7000"}, 7000),
    "nothing is allowed": ("0::/a\n", {"a/memory.max": "0\n"}, 0),
    "version 1": (V1, {"memory/job/step/memory.limit_in_bytes": "8000\n"}, 8000),
    "version 1 without limits": (V1, {"memory/job/step/memory.limit_in_bytes": f"{NONE_V1}\n"}, MACHINE),
    "version 1, limit of the group around": (
        V1,
        {
            "memory/job/step/memory.limit_in_bytes": f"{NONE_V1}\n",
            "memory/job/memory.limit_in_bytes": "9000\n",
            "memory/memory.limit_in_bytes": f"{NONE_V1}\n",
        },
        9000,
    ),
    "version 1, a container's mount": (V1, {"memory/memory.limit_in_bytes": "9000\n"}, 9000),
    "version 1, another group's limit": (V1, {"memory/other/memory.limit_in_bytes": "9000\n"}, MACHINE),
    "version 1, with others": ("5:hugetlb,memory:/j\n", {"memory/j/memory.limit_in_bytes": "9000\n"}, 9000),
    "controllers of similar names": ("5:memory2,xmemory:/j\n", {"memory/j/memory.limit_in_bytes": "9000\n"}, MACHINE),
    "odd lines": ("0:\n\nmemory\n:::\n0::\n0::a\n4:memory:a\n", {}, MACHINE),
    "odd lines before a good one": ("0:\n\nmemory\n0::/a\n", {"a/memory.max": "4000\n"}, 4000),
    **{
        f"odd number {text!r}": ("0::/a\n", {"a/memory.max": text, "memory.max": "5000\n"}, 5000)
        for text in ("", "\n", "-1\n", "1e3\n", "0x10\n", "4000 kB\n", "18446744073709551615\n", "\0", " 12\n")
    },
}


@pytest.mark.skipif(not hasattr(_C, "memory_limit"), reason="the kernels are simulated")
@pytest.mark.parametrize("name", CONTROL_GROUPS)
def test_memory_that_control_groups_leave(tmp_path, name):
    groups, files, expected = CONTROL_GROUPS[name]
    if groups is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
    for path, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert _C.memory_limit(str(tmp_path), MACHINE) == expected


@pytest.mark.skipif(not hasattr(_C, "memory_limit"), reason="the kernels are simulated")
def test_memory_limit_where_files_cannot_be_read(tmp_path):
    (tmp_path / "sys/fs/cgroup/a/memory.max").mkdir(parents=True)  # a folder, which even root cannot read
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a\n")
    assert _C.memory_limit(str(tmp_path), MACHINE) == MACHINE
    (tmp_path / "sys/fs/cgroup/memory.high").write_text("5000\n")
    assert _C.memory_limit(str(tmp_path), MACHINE) == 5000


def test_workspaces_after_fork():
    """A child of fork() works on its own copy of the arena and does not change its parent's."""
    torch.set_num_threads(1)  # a forked child must not use torch's threads
    model, x = DenseNetBC.variant("A+B+C", depth=10).eval(), torch.randn(16, 3, 32, 32)
    features = model.features.denseblock1(model.features.conv0(x))  # held in the arena
    expected = features.clone()
    pid = os.fork()
    if pid == 0:
        with torch.no_grad():
            same = model.features.denseblock1(model.features.conv0(x)).equal(expected)
        features.zero_()
        os._exit(0 if same else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert features.equal(expected)


def test_workspaces_of_threads_are_apart():
    """Four threads at once, each with its own model, compute the same as one after the other."""
    torch.set_num_threads(1)
    problems = [problem("B", depth=16, efficient="fused", drop_rate=0.0) for _ in range(4)]
    expected = [gradients(*p) for p in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for actual, wanted in zip(pool.map(lambda problem: gradients(*problem), problems), expected, strict=True):
                assert all(a.equal(b) for a, b in zip(actual, wanted, strict=True))
