"""The steps of the CPU benchmark that are timed, each implementation as fast as its settings make it.

Gradients become None after each step and the optimizer is torch's fused one, for all alike. Inference is under
inference_mode, or no_grad where a compiler asks for that.
"""

import time

import torch

from bench.implementations import IMPLEMENTATIONS
from bench.steps import TrainingStep

RECOMPUTING = ("checkpoint", "selective", "torchvision-efficient", "compile-budget", "fused-kept")


def left_out(name, workload):
    """The reason why an implementation has no place in a workload, or None."""
    if name == "saved-on-cpu":
        return "moves saved tensors from a GPU to the CPU, and here they are there"
    if not workload.training and name.startswith(RECOMPUTING):
        return "differs in what is kept for backward, and inference has none"
    if workload.training and IMPLEMENTATIONS[name].freeze:
        return "makes weights constant, for inference only"
    if name.startswith("torchvision") and workload.spec.variant:
        return "has neither Drop-Channel nor squeeze-and-excitation"
    if workload.masked and name.startswith("compile-budget"):
        return "recomputes masks wrongly (pytorch#190758): the others are what is left to compare with"
    return None


class TimedStep(TrainingStep):
    """One training step from the weights `state`. The first, of full size, is its warm-up: its numbers are in `first`."""

    def __init__(self, spec, state=None):
        self.state, self.compiled = state, spec.traits.runner == "compile"
        super().__init__(spec)

    def warm_up(self):
        self.module = self.model
        if self.state is not None:
            self.module.load_state_dict(self.state)
        if self.compiled:
            self.model = torch.compile(self.model, dynamic=False, backend=new_compiler(self.spec.traits))
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
        return [end - start for start, end in zip(times, times[1:], strict=False)]


class InferenceStep(TimedStep):
    """One forward pass in evaluation mode, by the methods of a training step, with nothing to do after it."""

    def warm_up(self):
        self.model.eval()
        self.without_gradients = torch.no_grad if self.compiled else torch.inference_mode
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


def new_step(workload, implementation, state=None):
    """The step of one implementation, warm."""
    return (TimedStep if workload.training else InferenceStep)(workload.spec_of(implementation), state)


def new_compiler(traits):
    """A new backend of torch.compile for each step: Dynamo reuses code between models whose backends are equal."""
    from torch._dynamo import config as dynamo
    from torch._functorch import config as partitioner
    from torch._inductor.compile_fx import compile_fx

    # All implementations compile one forward(): beyond the limit Dynamo would run them uncompiled and say nothing.
    dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit = 64, True

    # torch's own random numbers let compiled masks be compared; Drop-Channel's are few
    patches = {"fallback_random": True} | ({"freezing": True} if traits.freeze else {})

    def compile_graph(graph, inputs):
        with partitioner.patch(activation_memory_budget=traits.budget):
            return compile_fx(graph, inputs, config_patches=patches)

    return compile_graph
