"""Forward and backward of a batch as one CUDA graph: the work of launching hundreds of kernels is done once."""

import torch
from torch import Tensor

from training.gradients import Gradients

WARM_UP = 3  # passes before the recording: cuDNN and cuBLAS choose algorithms, PyTorch's allocator fills its pools


class GraphedGradients:
    """`Gradients`, recorded for one shape of batches and replayed. The optimizer stays outside.

    Gradients are the same tensors from step to step, which the recorded backward adds to: `clear` fills them with zeros.
    Random masks differ from replay to replay, since a recorded generator advances with each one. Saves the launches, costs
    the memory that one pass holds, which stays reserved for the graph.

    Args:
        gradients: what is recorded; its network in training mode, on a GPU.
        images: example of a batch [B, C, S, S], whose shape, dtype and memory format all batches have.
        labels: example [B].

    Parameters, buffers and the state of the random number generators are what they were before.
    """

    def __init__(self, gradients: Gradients, images: Tensor, labels: Tensor):
        network = gradients.network
        self.images, self.labels = images.clone(), labels.clone()
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        buffers = list(network.buffers())
        before = [buffer.clone() for buffer in buffers]
        random_state = torch.cuda.get_rng_state(images.device)
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                gradients(self.images, self.labels)
        torch.cuda.current_stream(images.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: a thread that pins memory for the next batches may go on while this one records
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.result = gradients(self.images, self.labels)
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        torch.cuda.set_rng_state(random_state, images.device)
        self.clear()

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """As Gradients; the result [2] is overwritten by the next call."""
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.result

    def clear(self) -> None:
        torch._foreach_zero_([parameter.grad for parameter in self.parameters])
