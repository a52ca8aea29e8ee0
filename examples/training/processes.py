"""The processes of one run: one alone, or those that torchrun started."""

import argparse
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from training.errors import UserError, explain

TIMEOUT = timedelta(minutes=10)  # of a collective: a process that died is noticed after this at the latest
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@dataclass
class Processes:
    """This process among its peers."""

    rank: int  # 0 <= rank < world_size, over all machines
    world_size: int
    device: torch.device  # of this process

    @classmethod
    def alone(cls, device: str) -> "Processes":
        """Return one process without peers."""
        return cls(0, 1, torch.device(device))

    @property
    def main(self) -> bool:
        """True in the process that writes files and prints."""
        return self.rank == 0

    def reduce_sum(self, tensor: Tensor) -> Tensor:
        """Replace `tensor`, which lies on `device`, by its sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Replace the tensors by those of the main process, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def gather(self, value) -> list:
        """Return every process's `value`, by rank, on all processes."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """End the process group; not to be called where a peer may have failed."""
        if self.world_size > 1:
            dist.destroy_process_group()


def start(options: argparse.Namespace) -> Processes:
    """Join the other processes, if torchrun started this one: by NCCL on GPUs, by Gloo on CPUs.

    Raises:
        UserError: torchrun's environment is incomplete, there are fewer GPUs than processes, or an option of one
            process only is given.
    """
    device = torch.device(options.device)
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # the default device of streams and graphs
        return Processes.alone(options.device)
    what = f"of the environment variables {', '.join(_VARIABLES)} some are set, but not all to integers"
    with explain(KeyError, ValueError, what=what, remedy="start several processes with torchrun"):
        rank, local_rank, world_size = (int(os.environ[name]) for name in _VARIABLES)
    if world_size > 1 and options.cuda_graph:
        raise UserError(f"--cuda-graph serves one process; there are {world_size}")
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine has no GPU of its own: PyTorch sees {torch.cuda.device_count()}; "
                "start fewer processes (torchrun --nproc-per-node)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return Processes(rank, world_size, device)
