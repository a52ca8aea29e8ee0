"""The steps that are measured: training and inference of a `Spec`, each as fast as its settings make it.

Gradients become None after each timed step and the optimizer is torch's fused one, for all alike. Inference is under
inference_mode, or no_grad where a compiler asks for that.
"""

import time

import torch
import torch.nn.functional as F

from bench.networks import build_batch, build_model


class TrainingStep:
    """Model, optimizer and batch of one `Spec`; calling it trains one step and waits for the device."""

    def __init__(self, spec):
        self.spec = spec
        self.model = build_model(spec)
        # fused: one pass, and on a GPU one launch, for many parameters
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, fused=True)
        self.batch = build_batch(spec)
        self.warm_up()

    def warm_up(self):
        """Train on two images of 8x8: that allocates gradients and momentum, starts threads, loads libraries."""
        batch, self.batch = self.batch, build_batch(self.spec, batch_size=2, size=8)
        self()
        self.batch = batch

    def clear(self):
        """Set gradients to zero; they stay allocated."""
        self.optimizer.zero_grad(set_to_none=False)

    def forward(self):
        images, labels = self.batch
        with self.spec.autocast(), self.spec.saved_tensors():
            return F.cross_entropy(self.model(images), labels)

    def finish(self, loss):
        loss.backward()
        self.optimizer.step()

    def __call__(self):
        self.clear()
        self.finish(self.forward())
        self.synchronize()

    def synchronize(self):
        if self.spec.device != "cpu":
            torch.accelerator.synchronize()


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
