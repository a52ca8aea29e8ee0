"""The peers of the CPU benchmark, each as fast as its settings make it, and the steps that are timed.

Gradients become None after each step and the optimizer is torch's fused one, for all alike. Inference is under
inference_mode, or no_grad where a compiler asks for that.
"""

import time
from dataclasses import replace

import torch
from harness import TrainingStep
from peers import Peer

LAST = "-channels-last"
PEERS = {
    "plain": Peer("plain"),
    "plain" + LAST: Peer("plain", True),
    "torchvision": Peer("torchvision"),
    "torchvision" + LAST: Peer("torchvision", True),
    "torchvision-efficient": Peer("torchvision-efficient"),
    "torchvision-efficient" + LAST: Peer("torchvision-efficient", True),
    "checkpoint": Peer("checkpoint"),
    "checkpoint" + LAST: Peer("checkpoint", True),
    "selective": Peer("selective"),
    "selective" + LAST: Peer("selective", True),
    "saved-on-cpu": Peer("saved-on-cpu", True),
    "compile": Peer("plain", False, "compile"),
    "compile" + LAST: Peer("plain", True, "compile"),
    "compile-budget-0.5": Peer("plain", False, "compile", budget=0.5),
    "compile-budget-0.5" + LAST: Peer("plain", True, "compile", budget=0.5),
    "compile-budget-0.1": Peer("plain", False, "compile", budget=0.1),
    "compile-budget-0.1" + LAST: Peer("plain", True, "compile", budget=0.1),
    "compile-frozen": Peer("plain", False, "compile", freeze=True),
    "compile-frozen" + LAST: Peer("plain", True, "compile", freeze=True),
    "fused": Peer("fused"),
    "fused" + LAST: Peer("fused", True),
    "fused-kept": Peer("fused-kept"),
    "fused-compile": Peer("fused", False, "compile"),
}
# In a run of a half type, to compare the types with each other.
FLOAT32 = {"fused-float32": Peer("fused", dtype="float32")}
RECOMPUTING = ("checkpoint", "selective", "torchvision-efficient", "compile-budget", "fused-kept")


def peer_of(name):
    return PEERS.get(name) or FLOAT32[name]


def left_out(name, workload):
    """Why a peer has no place in a workload, or None."""
    if name == "saved-on-cpu":
        return "moves saved tensors from a GPU to the CPU, and here they are there"
    if not workload.training and name.startswith(RECOMPUTING):
        return "differs in what is kept for backward, and inference has none"
    if workload.training and PEERS.get(name, Peer("")).freeze:
        return "makes weights constant, for inference only"
    if name.startswith("torchvision") and workload.spec.variant:
        return "has neither Drop-Channel nor squeeze-and-excitation"
    if workload.masked and name.startswith("compile-budget"):
        return "recomputes masks wrongly (pytorch#190758): the others are what is left to compare with"
    return None


def spec_of(workload, peer):
    """The `Spec` of one peer."""
    spec = workload.spec
    return replace(
        spec,
        implementation=peer.implementation,
        channels_last=peer.channels_last,
        dtype=peer.dtype or spec.dtype,
    )


class SpeedStep(TrainingStep):
    """One training step from the weights `state`. The first, of full size, is its warm-up: its numbers are in `first`."""

    def __init__(self, spec, peer, state=None):
        self.peer, self.state = peer, state
        super().__init__(spec)

    def warm_up(self):
        self.module = self.model
        if self.state is not None:
            self.module.load_state_dict(self.state)
        if self.peer.runner == "compile":
            self.model = torch.compile(self.model, dynamic=False, backend=_compiler(self.peer))
        torch.manual_seed(2)  # the masks
        start = time.perf_counter()
        self.first = self.first_call()
        self.warm_up_seconds = time.perf_counter() - start

    def first_call(self):
        loss = self.forward()
        loss.backward()
        return {
            "outputs": {"loss": loss.detach()},
            "gradients": {name: p.grad for name, p in self.module.named_parameters()},
            "running statistics": dict(self.module.named_buffers()),
        }

    def clear(self):
        for p in self.module.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()

    def timed(self):
        """Seconds of forward, backward and optimizer."""
        times = [time.perf_counter()]
        loss = self.forward()
        times.append(time.perf_counter())
        loss.backward()
        del loss  # and with it the graph: freeing what was kept is part of backward
        times.append(time.perf_counter())
        self.optimizer.step()
        self.optimizer.zero_grad()
        times.append(time.perf_counter())
        return [after - before for before, after in zip(times, times[1:], strict=False)]


class InferenceStep(SpeedStep):
    """One forward pass in evaluation mode; the same methods, with nothing to do after it."""

    def warm_up(self):
        self.model.eval()
        compiled = self.peer.runner == "compile"
        self.without_gradients = torch.no_grad if compiled else torch.inference_mode
        super().warm_up()

    def forward(self):
        with self.without_gradients(), self.spec.autocast():
            return self.model(self.batch[0])

    def first_call(self):
        return {"outputs": {"logits": self.forward().clone()}}

    def clear(self):
        pass

    def finish(self, output):
        pass

    def timed(self):
        start = time.perf_counter()
        self.forward()
        return [time.perf_counter() - start]


def new_step(workload, name, state=None):
    """The step of one peer, warm."""
    peer = peer_of(name)
    return (SpeedStep if workload.training else InferenceStep)(spec_of(workload, peer), peer, state)


def _compiler(peer):
    """A backend of torch.compile of its own for each peer: Dynamo reuses code between models whose backends are equal."""
    from torch._dynamo import config as dynamo
    from torch._functorch import config as partitioner
    from torch._inductor.compile_fx import compile_fx

    # all peers compile the same forward(): beyond the limit Dynamo would run them uncompiled and say nothing
    dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit = 64, True

    # torch's own random numbers, so that compiled masks can be compared; Drop-Channel's are few
    patches = {"fallback_random": True} | ({"freezing": True} if peer.freeze else {})

    def compile_graph(graph, inputs):
        with partitioner.patch(activation_memory_budget=peer.budget):
            return compile_fx(graph, inputs, config_patches=patches)

    return compile_graph
