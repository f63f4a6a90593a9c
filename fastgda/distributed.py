"""One training run by several processes, as torchrun starts them: `torchrun --nproc_per_node 2 train.py ...`.

Every process draws the same step, embeds its share of the step's images and gathers the others' embeddings; the loss,
which is cheap beside the embedding, is computed by all. The gradient of a process is then the part that its own rows
contribute, and the sum over processes is the gradient of one process that had all the rows: the same run up to the
order of additions, dropout included. NCCL on CUDA, gloo otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """The processes of a run; one by default."""

    rank: int = 0
    """This process."""
    size: int = 1
    """Number of processes."""

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """The rows of a batch of `rows` that this process embeds."""
        each = -(-rows // self.size)
        return slice(min(self.rank * each, rows), min((self.rank + 1) * each, rows))

    def gather(self, part: Tensor, rows: int) -> Tensor:
        """The whole batch [rows, E] from this process's share of it; gradients flow to the share."""
        return part if self.size == 1 else _Gather.apply(part, self, rows)

    def add_gradients(self, shared: Iterable[Tensor], repeated: Iterable[Tensor]) -> None:
        """Sums the gradients of `shared` parameters, averages those of parameters whose use every process repeats."""
        if self.size == 1:
            return
        repeated = list(repeated)
        for parameter in repeated:
            assert parameter.grad is not None
            parameter.grad /= self.size
        for parameter in [*shared, *repeated]:
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)

    def from_first(self, values: Tensor) -> Tensor:
        """The first process's `values`, so that all decide alike."""
        if self.size > 1:
            dist.broadcast(values, src=0)
        return values


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group, rows: int) -> Tensor:
        ctx.share = group.share(rows)
        each = -(-rows // group.size)
        padded = part.new_zeros(each, part.shape[1])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(group.size)]
        dist.all_gather(parts, padded)
        return torch.cat(parts)[:rows]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.share], None, None


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[Group, torch.device]]:
    """(the processes that torchrun started, or this one alone; the device of this process)."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Group(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Group(dist.get_rank(), size), device
        # whoever leaves while gloo's threads still hold tensors of the last exchange may be aborted at its end
        dist.barrier()
    finally:
        dist.destroy_process_group()
